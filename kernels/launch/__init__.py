"""What launches the kernels: how a launch is described, which config it gets, and the launch itself.

`request` describes a launch; `heuristic` answers it without measuring; `validity` is the one judge of what an
architecture can run; `search` lists what is worth measuring; `choice` decides; `launcher` launches, `replay` whole
calls at once. `cost` has FLOPs, bytes and estimates, `hardware` the facts that all of them stand on.
"""
