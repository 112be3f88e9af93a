"""Entry: QTFP's tokens, a study on planted patches that runs the member's own losses, and what a training step costs.

`python -m solution.studies.qtfp_tokens --study` plants a forged share of random patch tokens (B, P, D) and says what each
variant makes of it (`planted_world`); `--memory` measures peak memory and step time at giant scale (`step_cost`).
"""

from __future__ import annotations

import argparse
import sys

from solution.errors import door


@door("qtfp_tokens")
def main(argv: list[str] | None = None) -> int:
    """`--study`: the synthetic study. `--memory`: peak memory and step time at giant scale."""
    parser = argparse.ArgumentParser(prog="python -m solution.studies.qtfp_tokens", description=main.__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--study", action="store_true")
    action.add_argument("--memory", action="store_true")
    parser.add_argument("--seeds", type=int, default=5, help="of the study")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        parser.error(f"--seeds is {arguments.seeds}; it must be at least 1")
    if arguments.study:
        from solution.studies.planted_world import report_study

        report_study(arguments.seeds)
    else:
        from solution.studies.step_cost import report_memory

        report_memory()
    return 0


if __name__ == "__main__":
    sys.exit(main())
