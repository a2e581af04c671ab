"""Hooks of mkdocs: tables from the code, and links to files outside of docs/.

Pages link to files of the repository by relative paths, so that they work where the repository is
read. On the site, a linked Markdown file or notebook becomes a page, and any other file is copied.
A link to something that does not exist fails the build (`mkdocs build --strict`), and so do two
files that would have one address.
"""

import re
from collections import Counter
from functools import cache
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url
from nbconvert import MarkdownExporter

from doc_tools.reference import with_generated

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OUTSIDE = "repository"
"""The folder of the site for files outside of docs/."""
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def local_targets(path: Path) -> list[Path]:
    """Returns the files and folders that a Markdown file or notebook links to by relative paths."""
    prose = _CODE.sub("", _markdown(path))
    targets = [found[2] for found in LINK.finditer(prose)]
    return [(path.parent / target).resolve() for target in targets if _is_relative(target)]


def _markdown(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.suffix == ".md" else _notebook(path)[0]


@cache
def _notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """Returns a notebook as Markdown, and its pictures by the paths that this names."""
    folder = f"{path.stem}_pictures"
    resources = {"unique_key": "picture", "output_files_dir": folder}
    markdown, found = MarkdownExporter().from_filename(str(path), resources)
    return markdown, found["outputs"]


def _is_relative(target: str) -> bool:
    return not re.match(r"[a-z]+:", target)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files outside of docs/ that its pages link to, and those that these link to.

    Pages of docs/ that the navigation of mkdocs.yml does not list are listed at its end.
    """
    pages = files.documentation_pages()
    unlisted = [file.src_uri for file in pages if file.src_uri not in str(config.nav)]
    if unlisted:
        config.nav = [*(config.nav or ()), {"More": unlisted}]
    files.append(_outside(ROOT / "README.md", config))
    pages = files.documentation_pages()
    waiting = [Path(file.abs_src_path) for file in pages if file.abs_src_path]
    seen = set(waiting)
    while waiting:
        for target in local_targets(waiting.pop()):
            if target in seen or not target.is_file() or DOCS in target.parents:
                continue
            seen.add(target)
            files.append(_outside(target, config))
            if target.suffix == ".ipynb":
                for name, picture in _notebook(target)[1].items():
                    uri = f"{Path(site_uri(target)).parent.as_posix()}/{name}"
                    files.append(File.generated(config, uri, content=picture))
            if target.suffix in (".md", ".ipynb"):
                waiting.append(target)
    counts = Counter(file.dest_uri for file in files)
    if twice := [uri for uri, count in counts.items() if count > 1]:
        raise PluginError(f"several files would be {', '.join(twice)} on the site")
    return files


def _outside(path: Path, config: MkDocsConfig) -> File:
    uri = site_uri(path)
    if path.suffix == ".ipynb":
        return File.generated(config, uri, content=_notebook(path)[0])
    if not _has_twin(path):
        return File.generated(config, uri, abs_src_path=str(path))
    twin = f'href="{path.stem}.md"'
    content = path.read_text(encoding="utf-8").replace(twin, twin.replace(".md", ".html"))
    return File.generated(config, uri, content=content)


def site_uri(path: Path) -> str:
    """Returns where a file is on the site, relative to docs/; README.md is its first page.

    A page X.html beside a file X.md gets another name, since X.md becomes X.html.
    """
    if path == ROOT / "README.md":
        return "index.md"
    if DOCS in path.parents:
        return path.relative_to(DOCS).as_posix()
    if _has_twin(path):
        path = path.with_stem(f"{path.stem}-page")
    if path.suffix == ".ipynb":
        path = path.with_suffix(".md")
    return f"{OUTSIDE}/{path.relative_to(ROOT).as_posix()}"


def _has_twin(path: Path) -> bool:
    return path.suffix == ".html" and path.with_suffix(".md").is_file()


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills in generated tables, and points links to where their targets are on the site."""
    own = page.file.src_uri
    if page.file.abs_src_path is not None:
        folder = Path(page.file.abs_src_path).parent
    elif own.startswith(f"{OUTSIDE}/"):  # a notebook
        folder = (ROOT / own.removeprefix(f"{OUTSIDE}/")).parent
    else:
        return markdown

    def moved(found: re.Match[str]) -> str:
        before, target, after = found.groups()
        path = (folder / target).resolve()
        if not _is_relative(target) or ROOT not in path.parents:
            return found[0]
        if path.is_dir():
            index = path / "README.md"
            path = index if index.is_file() else path
        return f"{before}{get_relative_url(site_uri(path), own)}{after}"

    parts = _CODE.split(with_generated(markdown))
    return "".join(part if part.startswith("`") else LINK.sub(moved, part) for part in parts)
