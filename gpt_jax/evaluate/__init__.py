"""Evaluation of a model on text: `python -m gpt_jax eval`, and an adapter for EleutherAI's lm_eval.

Text becomes windows (`windows`), windows become log-probabilities (`score`), and those become numbers: loss, perplexity
and bits a byte (`loss`), or the answers that lm_eval asks for (`harness`).
"""
