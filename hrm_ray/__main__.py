"""The command `hrm-ray`, also as `python -m hrm_ray`."""

from hrm_ray.stop_signals import exit_at_once, handle_signals


def main() -> None:
    """Run the command line; signals are handled before anything is imported that takes time."""
    handle_signals(exit_at_once)
    from hrm_ray.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
