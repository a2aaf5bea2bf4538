"""Who runs the units of a plan: this process, ranks of a job array, Ray's actors."""
