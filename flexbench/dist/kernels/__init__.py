"""What the layers compute with, in the fastest form that a device has for it.

`linear` has products with weights in the model's type, `four_bits` with those of 4 bits. What is
compiled, by `native`, is a source in C with a module of the same name: `panel_product`,
`decode_attention`, `prefill_attention`, and `decode_layer`, which calls the others' kernels for
half a layer at once; of `four_bit_product`, the module is `four_bit_layouts`. `panels` says how a
matrix lies.
`allocator` keeps memory at hand that every step takes anew.
"""
