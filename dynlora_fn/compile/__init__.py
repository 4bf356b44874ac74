"""Compile a pure training step into one graph, and compute its peak memory."""

from dynlora_fn.compile._peak_memory import Peak as Peak
from dynlora_fn.compile._peak_memory import peak_memory as peak_memory
from dynlora_fn.compile._step import Step as Step
from dynlora_fn.compile._step import compile_step as compile_step
