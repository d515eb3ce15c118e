"""Drop-ins: the calls of other libraries, answered by `ddpm.Sampler`; one file per library."""
