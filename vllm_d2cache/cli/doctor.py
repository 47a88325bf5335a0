"""Say what is found here and what will not work, before anyone waits for a model to load. Exit status 1: something."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vllm_d2cache.doctor.environment import available_memory, check_environment, gpu_lines
from vllm_d2cache.doctor.finding import Finding
from vllm_d2cache.doctor.model_directory import check_model

_MARKS = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--model", type=Path, metavar="DIR", help="also look at this checkpoint")
    parser.add_argument("--json", action="store_true", help='print {"ok": ..., "findings": [...]}')


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 if there is a problem."""
    gpus = gpu_lines()
    findings = list(check_environment(gpus))
    if args.model:
        findings += check_model(args.model, _gpu_memory(gpus) if gpus else available_memory())
    healthy = all(finding.status != "problem" for finding in findings)
    if args.json:
        print(json.dumps({"ok": healthy, "findings": [finding.as_dict() for finding in findings]}, indent=1))
    else:
        _print(findings, healthy)
    return 0 if healthy else 1


def _gpu_memory(gpus: list[str]) -> int | None:
    """Bytes of all GPUs together: tensor parallelism spreads the weights."""
    try:
        return sum(int(line.split(",")[1].split()[0]) for line in gpus) << 20
    except (IndexError, ValueError):
        return None


def _print(findings: list[Finding], healthy: bool) -> None:
    width = max(len(finding.name) for finding in findings)
    section = None
    for finding in findings:
        if finding.section != section:
            section = finding.section
            print(section)
        print(f"  {_MARKS[finding.status]}  {finding.name:<{width}}  {finding.text}")
    count = sum(finding.status == "problem" for finding in findings)
    print("nothing stands in the way" if healthy else f"{count} problem{'s' * (count > 1)}")
