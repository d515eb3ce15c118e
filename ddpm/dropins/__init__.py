"""Drop-ins: the calls of other libraries, answered by `ddpm.Sampler`; a file for each, and what they need."""
