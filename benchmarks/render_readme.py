"""Fill the table of README.md from results/demo.json, as ``ssl-matfeat demo`` writes it.

ssl-matfeat demo --output benchmarks/results
python benchmarks/render_readme.py
"""

import json
import re
from pathlib import Path

from ssl_matfeat.demo import markdown_table

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).parent / "results" / "demo.json"
TABLE = re.compile(r"(?<=<!-- demo table -->\n).*?(?=<!-- end of demo table -->)", re.DOTALL)


def render(readme: str, report: dict) -> str:
    """Return the README with the report's table between its markers."""
    if not TABLE.search(readme):
        raise ValueError(f"{README.name} has no '<!-- demo table -->' to put the table after")
    table = markdown_table(report["rows"])
    return TABLE.sub(lambda _: f"\n{table}\n\n", readme)


if __name__ == "__main__":
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    README.write_text(render(README.read_text(encoding="utf-8"), report), encoding="utf-8")
