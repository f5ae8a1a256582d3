"""hrm_ray trains Hierarchical Reasoning Models (HRM, ACTv1) on Ray."""

__version__ = "0.1.0"
