"""Write docs/settings.md from .env.example: `python scripts/settings_page.py`; a test keeps the two equal."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "settings.md"

HEAD = """# Settings

From the environment, or from a file `.env` in the working directory. `.env.example` holds every setting with its default;
this page is made from it (`python scripts/settings_page.py`).

Under `idem up` whatever is given is used, whatever is not is embedded: MongoDB, Redis, photos and keys under `.data/`.
`ENVIRONMENT=production` refuses to start with a missing or weak secret, or with an embedded server.
"""


def page() -> str:
    """The page as it must be."""
    lines, comments = [HEAD], []
    for line in (ROOT / ".env.example").read_text(encoding="utf-8").splitlines():
        section = re.fullmatch(r"# --- (.+)", line)
        setting = re.fullmatch(r"#?([A-Z][A-Z0-9_]*)=(.*)", line)
        if section:
            lines += [f"\n## {section[1]}\n", "| setting | default | what it is |", "| --- | --- | --- |"]
            comments = []
        elif setting:
            default = f"`{setting[2]}`" if setting[2] else ""
            lines.append(f"| `{setting[1]}` | {default} | {' '.join(comments)} |")
            comments = []
        elif line.startswith("# "):
            comments.append(line[2:].replace("|", "\\|"))
        else:
            comments = []
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
