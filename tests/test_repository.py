"""What holds for all scripts: equal copies of shared blocks, an honest equation index, short lines."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [name for name in ("sdfl.py", "heatmap_landmarks.py", "lddmm_face.py", "stn_align.py", "kprpe.py")
           if (ROOT / name).exists()]
COPIED = {"conv", "conv_bn", "init_weights", "BasicBlock", "Bottleneck", "InvertedResidual", "Features",
          "Fuse", "HRModule", "read_faces", "constant"}
PACKAGES = {"torch", "numpy", "cv2", "tqdm", "pytest", "h5py", "common", "tests"} | {s[:-3] for s in SCRIPTS}
FILES = sorted([*(ROOT / "common").glob("*.py"), *(ROOT / "tests").glob("*.py"),
                *(ROOT / s for s in SCRIPTS)])


def test_what_surrounds_a_training_stays_small():
    text = (ROOT / "common/run.py").read_text()
    assert len(text.splitlines()) <= 450
    for script in SCRIPTS:  # and it knows no script
        assert script[:-3] not in text and "loss.backward" not in text


def test_a_block_that_two_scripts_copy_is_the_same_in_both():
    """But for comment lines, which say what a copy leaves out."""
    seen = {}
    for script in SCRIPTS:
        text = (ROOT / script).read_text()
        for node in ast.parse(text).body:
            if getattr(node, "name", None) in COPIED:
                seen.setdefault(node.name, {})[script] = ast.unparse(node)
    for name, copies in seen.items():
        assert len(set(copies.values())) == 1, f"{name} differs between {', '.join(copies)}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_docstring_lists_the_equations_that_the_code_names(script):
    text = (ROOT / script).read_text()
    docstring = ast.get_docstring(ast.parse(text))

    def numbers(part):  # "Eq. (3)", "Eq. (1), (2)"; those of another paper carry its key in brackets
        found = re.findall(r"Eqs?\. (\(\d+\)(?:, \(\d+\))*)(?! ?\[)", part)
        return {int(n) for group in found for n in re.findall(r"\d+", group)}

    code = text[text.index(docstring.splitlines()[-1]):]
    listed = {int(n) for line in re.findall(r"^ {2}Eqs?\. (.*?) {2}", docstring, re.M)
              for n in re.findall(r"\((\d+)\)", line)}
    assert listed and numbers(code) <= listed
    for line in re.findall(r"^ {2}Eqs?\. .*$", docstring, re.M):  # each name that the index gives exists
        for name in re.split(r" {2,}", line)[-1].split(", "):
            if not name.startswith("common."):
                assert re.search(rf"^(def|class) {name}\b", text, re.M), f"{script}: no {name}"
            else:
                module, function = name.split(".")[1:]
                assert f"def {function}" in (ROOT / "common" / f"{module}.py").read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_five_packages_are_imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
            [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            root = name.split(".")[0]
            assert root in PACKAGES or root in sys.stdlib_module_names, f"{path.name}:{node.lineno}: {root}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_and_functions_are_short(path):
    text = path.read_text()
    limit = 110 if path.parent.name == "tests" else 100
    long = [n for n, line in enumerate(text.splitlines(), 1) if len(line) > limit]
    assert not long, f"{path.name}: lines {long} are over {limit} columns"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < (
                80 if node.name in ("train", "parse_args") else 60), node.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_free_of_side_effects(script, tmp_path):
    out = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True,
                         cwd=tmp_path)
    assert out.returncode == 0 and "--data-root" in out.stdout and not list(tmp_path.iterdir())


def test_readme_names_every_script_that_exists():
    readme = (ROOT / "README.md").read_text()
    assert all(f"python {script}" in readme for script in SCRIPTS)
    for path in re.findall(r"python -m (tests\.\w+)", readme):
        assert (ROOT / (path.replace(".", "/") + ".py")).exists()
