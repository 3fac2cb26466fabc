"""Environments: problems, and the rewards of answers to them, for training with rewards.

`environment.open_environment` opens one by its name, `judges.Judges` has answers judged by several processes. Nothing
here imports JAX, so that these processes start at once and stay small.
"""
