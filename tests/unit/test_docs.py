"""Pages that must stay true."""

import importlib.util
import re
from pathlib import Path

from app.config import Settings

ROOT = Path(__file__).resolve().parents[2]


def test_the_settings_page_is_made_from_the_example_file() -> None:
    spec = importlib.util.spec_from_file_location("settings_page", ROOT / "scripts" / "settings_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page() == (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")


def test_every_setting_stands_on_the_settings_page() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    missing = [name for name in Settings.model_fields if f"`{name.upper()}`" not in page]
    assert missing == []


def test_links_between_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    links = re.compile(r"\]\((?!https?://|#)([^)#]+)")
    targets = [(page, target) for page in pages for target in links.findall(page.read_text(encoding="utf-8"))]
    broken = [
        f"{page.relative_to(ROOT)} -> {target}" for page, target in targets if not (page.parent / target).exists()
    ]
    assert broken == []
