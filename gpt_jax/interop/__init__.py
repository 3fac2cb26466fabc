"""Published models in the formats of other ecosystems: loading and saving them."""
