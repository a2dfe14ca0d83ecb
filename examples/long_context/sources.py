"""Long documents that any machine has: the source trees of the packages installed beside burnish.

    python examples/long_context/sources.py sources.jsonl [--characters 400000] [--packages N] [--site FOLDER]

Writes one row {"text": ...} a package: its Python files in the order of their paths, each under a line with its path,
up to the first that would make it longer than --characters. The same packages give the same bytes again. Nothing is
downloaded. Code has about four characters a token, so that a full document is about 100k tokens.
"""

import argparse
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SHORTEST = 2000  # characters: below, a package is no long document


def document(package: Path, limit: int) -> str:
    """The package's Python files, whole ones only, up to `limit` characters; a first file that is longer is cut."""
    parts: list[str] = []
    length = 0
    for path in sorted(package.rglob("*.py")):
        try:
            part = f"# {path.relative_to(package.parent).as_posix()}\n{path.read_text(encoding='utf-8')}\n"
        except (UnicodeDecodeError, OSError):
            continue  # a test file in another encoding, a broken link
        if parts and length + len(part) > limit:
            break
        parts.append(part[: limit - length])
        length += len(parts[-1])
    return "".join(parts)


def documents(site: Path, limit: int) -> Iterator[tuple[str, str]]:
    """(name, text) of every package under `site` that has a document's worth of source, by name."""
    for package in sorted(path for path in site.iterdir() if (path / "__init__.py").is_file()):
        text = document(package, limit)
        if len(text) >= SHORTEST:
            yield package.name, text


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--characters", type=int, default=400_000, help="longest document")
    parser.add_argument("--packages", type=int, help="stop after so many")
    parser.add_argument("--site", type=Path, default=Path(sysconfig.get_paths()["purelib"]))
    options = parser.parse_args(words)
    count = total = longest = 0
    with options.target.open("w", encoding="utf-8") as out:
        for _, text in documents(options.site, options.characters):
            out.write(json.dumps({"text": text}) + "\n")
            count, total, longest = count + 1, total + len(text), max(longest, len(text))
            if count == options.packages:
                break
    print(f"{options.target}: {count} documents, {total:,} characters, the longest {longest:,}")


if __name__ == "__main__":
    main()
