"""Makes a small copy of a recipe, which runs its layout here: four layers, narrow, random weights, sums for prompts.

    python tools/make_cut.py configs/scaling/dense_base.yaml runs/cut [KEY=VALUE]...
    megatron-dppo train runs/cut/recipe.yaml

What is kept and what is not: `megatron_dppo/cut.py`. A model that is not there is looked for in configs/models.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_dppo.config.loading import load_config
from megatron_dppo.cut import write_cut

MODELS = Path(__file__).parents[1] / "configs"  # the recipes' models/NAME lie there, their config.json alone

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    config = load_config(arguments.recipe, arguments.overrides)
    if not config.model.path.is_dir():
        config = config.model_copy(
            update={"model": config.model.model_copy(update={"path": MODELS / config.model.path})}
        )
    path = write_cut(config, arguments.out)
    parallel = load_config(path).parallel
    print(f"{path}: {parallel.ranks} ranks of {config.parallel.ranks}")
