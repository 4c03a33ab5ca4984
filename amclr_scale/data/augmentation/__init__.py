"""Random changes to pictures: drawn first (`plans`), then carried out by Pillow (`pictures`) or in batches (`batched`).

The two give the same bytes. Pillow works on one picture in a worker process; the other one on many uint8 tensors at
once, on whichever device holds them.
"""
