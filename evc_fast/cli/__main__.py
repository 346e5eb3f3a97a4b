"""`python -m evc_fast.cli`, as under `torchrun --nproc-per-node 2 -m evc_fast.cli train ...`."""

from evc_fast.cli import main

main()
