"""Fetch tasks and models ahead, for a machine that will be offline: python data/prepare.py NAME..."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.download import MODELS, model_folder  # noqa: E402
from data.tasks import TASKS, load_task  # noqa: E402


def main(names):
    known = [*MODELS, *TASKS]
    if not names or names[0] in ("--help", "-h"):
        print(f"{__doc__}\n\nmodels: {', '.join(MODELS)}\ntasks:  {', '.join(TASKS)}")
        return 0
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"prepare.py: unknown name {unknown[0]!r}: it is one of {', '.join(known)}", file=sys.stderr)
        return 2
    try:
        for name in names:
            if name in MODELS:
                print(f"{name}: {model_folder(name)}")
            else:
                task = load_task(name)
                print(f"{name}: {task.source}: {len(task.train):,} train, {len(task.validation):,} validation, {len(task.test):,} test")
    except (ValueError, OSError) as error:
        print(f"prepare.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
