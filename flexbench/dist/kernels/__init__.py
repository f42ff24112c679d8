"""What the layers compute with: linear maps, in the fastest form that a device has for them.

`linear` has weights in the model's type, `four_bits` those of 4 bits, `allocator` keeps memory at
hand that every step takes anew.
"""
