"""The memory core: blocks, who holds them, what they hold. Knows no tensors.

::

    KVManager            block tables: which sequence holds which blocks, in what order
      ├── Allocator      a policy: how many slots a sequence should hold
      ├── BlockPool      reference counts, written slots, reuse of cached blocks
      │     ├── Placement     where free blocks are taken from: anywhere, buddy, first fit
      │     └── PrefixCache   which block holds which content
      └── Ledger         the state of every slot, at every step
"""
