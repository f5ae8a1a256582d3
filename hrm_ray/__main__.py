"""`python -m hrm_ray` is the command `hrm-ray`."""

from hrm_ray.cli.main import main

main()
