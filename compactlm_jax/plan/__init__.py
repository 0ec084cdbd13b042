"""What a training step costs on a TPU that is not here: libtpu's compiler runs on any x86 Linux host.

Everything in this folder is an estimate by the compiler or arithmetic on it. Nothing is measured.
"""
