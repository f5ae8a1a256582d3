"""Merging weights: streaming over safetensors files, a rule for each tensor, outer steps."""

from __future__ import annotations

from hrm_ray.merging.lora import LoraResidual
from hrm_ray.merging.members import Member, MemberFigures, check_member
from hrm_ray.merging.merge import OUTER_STEPS, AnchorFiles, MergeReport, OuterStep, merge_deltas
from hrm_ray.merging.rules import TOUCHED, Rule, rule_of
from hrm_ray.merging.tensor_file import TensorFile

__all__ = [
    "OUTER_STEPS",
    "TOUCHED",
    "AnchorFiles",
    "LoraResidual",
    "Member",
    "MemberFigures",
    "MergeReport",
    "OuterStep",
    "Rule",
    "TensorFile",
    "check_member",
    "merge_deltas",
    "rule_of",
]
