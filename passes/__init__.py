"""The passes: one file each, every one Program -> Program."""
