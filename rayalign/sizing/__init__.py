"""What a run will need, before it is started: memory, operations, GPUs, hours and cost, from the model's config and the data.

`architecture` builds the model without weights, `rehearsal` runs a step of it with tensors that are none, `meter` counts,
`lengths` looks at the data; `memory`, `flops` and `advice` draw conclusions, `findings` holds them and `table` writes them.
"""
