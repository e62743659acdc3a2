"""Fetch tasks and models ahead, for a machine that will be offline: python data/prepare.py NAME..."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.download import MODELS, model_folder  # noqa: E402
from data.glue import GLUE  # noqa: E402
from data.tasks import MIX, TASKS, load_task  # noqa: E402


def main(names):
    tasks = [*TASKS, *GLUE, MIX]
    if not names or names[0] in ("--help", "-h"):
        print(f"{__doc__}\n\nmodels: {', '.join(MODELS)}, or a name on the Hub\ntasks:  {', '.join(tasks)}")
        return 0
    try:
        for name in names:
            if name in tasks:
                task = load_task(name)
                print(f"{name}: {task.source}: {len(task.train):,} train, {len(task.validation):,} validation, {len(task.test):,} test")
            else:
                print(f"{name}: {model_folder(name)}")
    except (ValueError, OSError) as error:
        print(f"prepare.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
