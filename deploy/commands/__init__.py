"""Commands of the command line, one module each: a thin function that reads arguments and prints.

Torch, Ray and transformers are imported inside the functions, so that `--help` and a refused argument are instant.
"""
