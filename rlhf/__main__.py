"""`python -m rlhf`: compose the configuration, check it, and hand it to a fresh process that does the work.

This process never imports torch, so that help and every config error answer in about a second.
"""

from __future__ import annotations

import os
import sys

from rlhf.errors import RLHFError


def main() -> None:
    """The console script `rlhf`."""
    given = [a for a in sys.argv[1:] if not a.startswith(("--local_rank", "--local-rank"))]
    # Hydra's parser takes -m only in front of the overrides; the sort is stable and moves nothing else.
    sys.argv = [sys.argv[0], *sorted(given, key=lambda a: a not in ("-m", "--multirun"))]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints its own short form and exits 1
    sys.exit(_compose_and_run())


def _compose_and_run() -> int:
    import hydra
    from omegaconf import DictConfig

    from rlhf.compose import CONF_DIR, friendly, register, to_config
    from rlhf.config import Do
    from rlhf.gates import validate
    from rlhf.launch import JobFailed, launch, resolve_run_dir

    register()
    codes: list[int] = []
    process = os.getpid()

    @hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="config")
    def job(cfg: DictConfig) -> None:
        try:
            config = to_config(cfg)
            if config.do in (Do.run, Do.plan, Do.gate):  # what judges: looking a policy's tasks up can take long
                validate(config.gate)
            resolve_run_dir(config)
            codes.append(launch(config))
        except RLHFError as error:  # kept from Hydra, which would end a sweep's other jobs
            codes.append(report(error))
        if codes[-1] and os.getpid() != process:  # a launcher plug-in's job: its `codes` is a copy
            raise JobFailed(codes[-1])

    try:
        job()
    except JobFailed as failed:
        return failed.code
    except Exception as error:
        shown = friendly(error)
        if shown is None:
            raise
        return report(shown)
    return next((code for code in codes if code), 0)


def report(error: RLHFError) -> int:
    """Print the one message of a user error and give its exit code."""
    sys.stderr.write(f"error: {error}\n")
    return error.exit_code


if __name__ == "__main__":
    main()
