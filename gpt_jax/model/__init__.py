"""The GPT: linen modules, attention, the KV cache and the loss, all pure functions of their arguments.

Array names end in their dimensions, here and everywhere in the project:

    B  batch (sequences)            H  query heads
    T  time (queries)               G  key/value heads
    S  time (keys)                  R  query heads per key/value head, H / G; or ranks of adapters
    D  model width                  K  width of one head
    F  feed-forward width           L  layers
    V  vocabulary                   N  tokens, B * T flattened
    X  key/value heads of all sequences, B * G flattened
    A  microbatches; or adapters    C  tokens, or logits, in a chunk or block
"""
