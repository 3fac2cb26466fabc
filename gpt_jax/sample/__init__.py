"""Text in, text out: logit filters, the jitted decode loop, streaming."""
