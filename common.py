"""What all files here share: files that survive a crash, and errors that a user reads in one sentence."""

import json
import os
import re
import shutil
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

MAX_JSON = 2**26  # bytes; in memory, JSON takes up to 25 times as much


def one_line(error):
    """The message of an exception, in one line."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    return " ".join(str(error).split())[:300] or type(error).__name__


class Forgiving:
    """stdout or stderr, of which a full disk, a closed terminal or `| head` loses text, but never ends the program."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # the shell's >&- leaves None, and the next file its number

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError, ValueError):
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                self.stream.write(text.encode("ascii", "backslashreplace").decode())
        return len(text)

    def flush(self):
        with suppress(OSError, ValueError):
            self.stream.flush()


@contextmanager
def exit_on_error(interrupted="interrupted"):
    """Errors that a user can cause end the script with one sentence, and so does Ctrl-C; `| head` without a word."""
    script, sys.stderr = Path(sys.argv[0]).name, Forgiving(sys.stderr)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # the shell's >&-
    try:
        yield
        print(end="", flush=True)  # what fails here is told, as elsewhere
    except BrokenPipeError:
        sys.exit(1)
    except (ValueError, OSError) as e:
        sys.exit(f"{script}: {one_line(e)}")
    except KeyboardInterrupt:
        sys.exit(f"{script}: {interrupted}")
    finally:
        sys.stdout = Forgiving(sys.stdout)  # Python flushes it once more


@contextmanager
def errors_name_file(path, fault="is damaged"):
    """Whatever fails inside is the fault of this file's content: it becomes a ValueError that names the file."""
    try:
        yield
    except Exception as e:
        named = re.search(rf"(?<!\S){re.escape(str(path))}([\s/:,;]|$)", one_line(e))
        raise ValueError(one_line(e) if named else f"{path} {fault}: {one_line(e)}") from None


def brief(value):
    """A value of a file as text for a sentence. One that holds others may hold them without end."""
    return repr(value)[:40] if isinstance(value, (bool, int, float, str)) else f"of type {type(value).__name__}"


def check_types(content, **types):
    """Raise KeyError or ValueError unless `content` is a dict with these keys, of these types. An int is a count."""
    if not isinstance(content, dict):
        raise ValueError(f"what is {brief(content)} stands where a dict of {', '.join(types)} should")
    for key, kind in types.items():
        if type(content[key]) is not kind or (kind is int and not 0 <= content[key] < 2**63):
            raise ValueError(f"{key} is {brief(content[key])}")


def read_json(path):
    """The object in a JSON file. Raises FileNotFoundError, or ValueError that names the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no {path}")
    with errors_name_file(path):
        if Path(path).stat().st_size > MAX_JSON:
            raise ValueError(f"it has more than {MAX_JSON:,} bytes")
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        return content


def replace_file(path, content):
    """Write bytes beside `path` and rename: after a crash the file is the old or the new one, whole."""
    part = Path(f"{path}.part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_directory(part.parent)


@contextmanager
def replace_files(directory):
    """Yields a directory to write to. Its files then take their places in `directory`, or after an error none does."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory, prefix=".part-") as part:
        yield Path(part)
        for path in Path(part).iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        for path in Path(part).iterdir():
            os.replace(path, Path(directory, path.name))
    sync_directory(directory)


def sync_directory(directory):
    """Flush a directory's names to the disk, where the system can."""
    with suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        with suppress(OSError):
            os.fsync(handle)
        os.close(handle)


def lock_file(file, sentence):
    """Lock an open file or directory until this process ends, however it does. Raises ValueError with the sentence if
    another process holds the lock."""
    try:
        import fcntl  # which Windows lacks

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(sentence) from None
    except (ImportError, OSError):
        pass  # a system without such locks


def finish_rename(directory):
    """Make the second rename of data.py's two, where it was killed before that: `directory` is then the new dataset."""
    part = directory.with_name(f"{directory.name}.part")
    if (part / "old").exists() and not directory.exists():
        (part / "new").rename(directory)
        print(f"{directory}: data.py was killed while it replaced this dataset; now the new one is in place")
        shutil.rmtree(part, ignore_errors=True)


def local_directory(name, *patterns, repo_type="model"):
    """The directory `name`, or a local copy of the hub's model or dataset of that name, downloaded if need be."""
    if Path(name).is_dir():
        return Path(name)
    if str(name).count("/") != 1 or str(name).startswith((".", "/")):
        raise FileNotFoundError(f"there is no directory {name} with a {repo_type}")
    try:
        from huggingface_hub import snapshot_download

        patterns = patterns or ("*.json", "*.safetensors")
        return Path(snapshot_download(name, repo_type=repo_type, allow_patterns=patterns))
    except Exception as e:
        error = f"{type(e).__name__}: {one_line(e)}"
        raise ValueError(f"{name} is no directory and cannot be downloaded from the hub: {error}") from None
