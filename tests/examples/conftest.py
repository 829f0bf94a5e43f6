import sys
from pathlib import Path

# The example's programs import each other as siblings, as they do when they are run.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "shapes"))
