"""Multi-omics loader, the cache of prepared data, downloads, preprocessing, clean exits."""

import http.server
import io
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from experiments.common.errors import InputError, exit_cleanly
from experiments.datasets import Dataset, Split, multiomics, prepared
from experiments.datasets.download import Remote, fetch, git_blob, sha256, unpack
from experiments.datasets.preprocess import carve_validation, min_max

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"the real data {name} is not in {SHARED}")
    return SHARED / name


def write_rosmap(folder: Path, train: int = 6, test: int = 4) -> Path:
    """A made-up data set in ROSMAP's form."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, rows in (("tr", train), ("te", test)):
        for i in (1, 2, 3):
            np.savetxt(folder / f"{i}_{suffix}.csv", rng.random((rows, 200)), delimiter=",")
        np.savetxt(folder / f"labels_{suffix}.csv", np.arange(rows) % 2.0)
    return folder


@pytest.fixture
def rosmap(tmp_path):
    return write_rosmap(tmp_path / "data")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


class TestLoad:
    def test_real_rosmap(self, cache):
        folder = shared("rosmap")
        data = multiomics.load("rosmap", folder, cache)
        assert (data.description, data.data, data.validation) == ("ROSMAP", "real", None)
        assert data.classes == ("Normal control", "Alzheimer's disease")
        for split, rows, suffix in ((data.train, 245, "tr"), (data.test, 106, "te")):
            assert split.labels.shape == (rows,) and split.labels.dtype == np.int32
            labels = np.loadtxt(folder / f"labels_{suffix}.csv")
            np.testing.assert_array_equal(split.labels, labels)
            for i, modality in enumerate(("mRNA", "methylation", "miRNA")):
                expected = np.loadtxt(folder / f"{i + 1}_{suffix}.csv", delimiter=",")
                assert split.inputs[modality].dtype == np.float32
                np.testing.assert_array_equal(
                    split.inputs[modality], expected.astype(np.float32), err_msg=modality
                )

    @pytest.mark.parametrize("name", ["rosmap", "brca"])
    def test_checksums_are_those_of_the_published_files(self, name):
        folder = shared({"rosmap": "rosmap", "brca": "brca_partial"}[name])
        found = [
            r for r in multiomics.remotes(multiomics.COHORTS[name]) if (folder / r.name).exists()
        ]
        assert len(found) == {"rosmap": 8, "brca": 3}[name]
        for remote in found:
            path = folder / remote.name
            assert (path.stat().st_size, git_blob(path)) == (remote.size, remote.git_blob)

    def test_partial_brca_lists_what_is_missing_and_how_to_get_it(self, cache):
        with pytest.raises(InputError) as caught:
            multiomics.load("BRCA", shared("brca_partial"), cache)
        message = str(caught.value)
        assert "1_tr.csv, 1_te.csv, 2_tr.csv, 2_te.csv, 3_tr.csv of BRCA" in message
        assert "3_te.csv" not in message and "txWang/MOGONET" in message and "download" in message

    def test_folder_may_hold_a_folder_of_the_name(self, tmp_path, cache):
        write_rosmap(tmp_path / "all" / "ROSMAP")
        assert len(multiomics.load("rosmap", tmp_path / "all", cache).train.labels) == 6

    def test_without_data_says_how_to_get_it(self, cache):
        with pytest.raises(InputError, match=r"labels_te.csv of ROSMAP; ask for the download"):
            multiomics.load("rosmap", None, cache)

    @pytest.mark.parametrize("name", ["rosmap", "brca"])
    def test_a_synthetic_copy_has_the_shapes_of_the_published_data(self, name):
        """The counts are those of the published labels; the widths those of the paper."""
        data, again = multiomics.sample(name), multiomics.sample(name)
        folder = shared({"rosmap": "rosmap", "brca": "brca_partial"}[name])
        labels = np.loadtxt(folder / "labels_tr.csv").astype(int)
        assert tuple(np.bincount(labels)) == multiomics.COHORTS[name].frequencies
        assert len(data.train.labels) == len(labels)
        assert len(data.test.labels) == len(np.loadtxt(folder / "labels_te.csv"))
        widths = {"rosmap": [200, 200, 200], "brca": [1000, 1000, 503]}[name]
        assert [x.shape[1] for x in data.train.inputs.values()] == widths
        assert "sample (synthetic)" in data.description and data.validation is None
        share = np.bincount(data.train.labels) / len(labels)
        np.testing.assert_allclose(share, np.bincount(labels) / len(labels), atol=0.06)
        np.testing.assert_array_equal(data.test.inputs["miRNA"], again.test.inputs["miRNA"])
        x = data.train.inputs["mRNA"]
        assert x.min() >= 0 and x.max() <= 1 and x.dtype == np.float32

    def test_unknown_name(self):
        with pytest.raises(InputError, match="'tcga': rosmap and brca are"):
            multiomics.load("tcga")


def replace_cell(path: Path, row: int, column: int, text: str) -> None:
    lines = [line.split(",") for line in path.read_text().splitlines()]
    lines[row][column] = text
    path.write_text("\n".join(",".join(line) for line in lines))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: replace_cell(d / "2_tr.csv", 3, 7, "nan"), r"2_tr.csv: line 4, column 8 is NaN"),
        (lambda d: replace_cell(d / "2_te.csv", 1, 0, "abc"), r"2_te.csv is not a table.*abc"),
        (lambda d: replace_cell(d / "1_tr.csv", 2, 5, "1,2"), r"1_tr.csv is not a table.*columns"),
        (lambda d: replace_cell(d / "1_tr.csv", 2, 5, "#1"), r"1_tr.csv is not a table.*#1"),
        (lambda d: np.savetxt(d / "3_tr.csv", np.ones((6, 199)), delimiter=","),
         r"3_tr.csv \(miRNA\) has 6 rows of 199 numbers; expected 6 rows.*of 200"),
        (lambda d: np.savetxt(d / "3_te.csv", np.ones((5, 200)), delimiter=","),
         r"3_te.csv \(miRNA\) has 5 rows of 200 numbers; expected 4 rows"),
        (lambda d: replace_cell(d / "labels_tr.csv", 1, 0, "2"), r"line 2 is 2; .*from 0 to 1"),
        (lambda d: replace_cell(d / "labels_tr.csv", 1, 0, "0.5"), r"line 2 is 0.5; .*from 0 to 1"),
        (lambda d: (d / "labels_te.csv").write_text(" \n"), r"labels_te.csv is empty"),
        (lambda d: (d / "1_te.csv").write_bytes(b"\xff\xfe\x00"), r"1_te.csv is not a table"),
        (lambda d: (d / "labels_te.csv").write_text("0,1\n"), r"2 columns; expected one label"),
    ],
)  # fmt: skip
def test_bad_tables(rosmap, cache, damage, message):
    damage(rosmap)
    with pytest.raises(InputError, match=message):
        multiomics.load("rosmap", rosmap, cache)
    assert not list(cache.glob("*/*")), "a failed build left something behind"


class TestCache:
    def count_builds(self, monkeypatch) -> list:
        builds = []
        original = prepared._build
        monkeypatch.setattr(prepared, "_build", lambda *a: (builds.append(1), original(*a))[1])
        return builds

    def test_second_load_reuses_and_changed_source_rebuilds(self, rosmap, cache, monkeypatch):
        builds = self.count_builds(monkeypatch)
        first = multiomics.load("rosmap", rosmap, cache)
        again = multiomics.load("rosmap", rosmap, cache)
        assert len(builds) == 1
        np.testing.assert_array_equal(first.train.inputs["mRNA"], again.train.inputs["mRNA"])
        replace_cell(rosmap / "1_tr.csv", 0, 0, "0.125")
        assert multiomics.load("rosmap", rosmap, cache).train.inputs["mRNA"][0, 0] == 0.125
        assert len(builds) == 2

    @pytest.mark.parametrize("harm", ["flip", "cut", "remove", "no checksums"])
    def test_damage_is_noticed_and_repaired(self, rosmap, cache, monkeypatch, capsys, harm):
        before = multiomics.load("rosmap", rosmap, cache)
        (shard,) = cache.glob("*/*/*train.array_record*")
        content = bytearray(shard.read_bytes())
        if harm == "flip":
            content[len(content) // 2] ^= 1
            shard.write_bytes(content)
        elif harm == "cut":
            shard.write_bytes(content[:-10])
        elif harm == "remove":
            shard.unlink()
        else:
            (shard.parent / "checksums.json").unlink()
        builds = self.count_builds(monkeypatch)
        after = multiomics.load("rosmap", rosmap, cache)
        assert len(builds) == 1 and "preparing it again" in capsys.readouterr().err
        np.testing.assert_array_equal(before.train.inputs["mRNA"], after.train.inputs["mRNA"])

    def test_a_build_that_is_killed_is_not_taken_for_whole(self, rosmap, cache):
        script = f"""
import os
from experiments.datasets import multiomics
def dies(self, rows):
    yield from list(self._whole(rows))[:3]
    os._exit(9)
multiomics.MultiOmics._whole = multiomics.MultiOmics._generate_examples
multiomics.MultiOmics._generate_examples = dies
multiomics.load("rosmap", {str(rosmap)!r}, {str(cache)!r})
"""
        root = Path(__file__).resolve().parents[1]
        assert subprocess.run([sys.executable, "-c", script], cwd=root).returncode == 9
        assert list(cache.glob("*/incomplete-*")), "the build should have been under way"
        assert len(multiomics.load("rosmap", rosmap, cache).train.labels) == 6

    def test_when_another_process_was_faster_its_result_stays(self, rosmap, cache, monkeypatch):
        original = prepared._build

        def overtaken(*args):
            monkeypatch.setattr(prepared, "_build", original)
            multiomics.load("rosmap", rosmap, cache)
            return original(*args)

        monkeypatch.setattr(prepared, "_build", overtaken)
        assert len(multiomics.load("rosmap", rosmap, cache).train.labels) == 6

    def test_place(self, rosmap, tmp_path, monkeypatch):
        monkeypatch.setenv(prepared.CACHE_VARIABLE, str(tmp_path / "by variable"))
        multiomics.load("rosmap", rosmap)
        assert list((tmp_path / "by variable").glob("multi_omics_rosmap/*/*.array_record*"))
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match="set DEQ_FUSION_CACHE"):
            prepared.cache_root(tmp_path / "file")

    def test_tfds_is_quiet_and_tensorflow_stays_out(self, rosmap, cache, capfd):
        multiomics.load("rosmap", rosmap, cache)
        out, err = capfd.readouterr()
        assert err == "" and out.count("\n") == 1 and out.startswith("preparing multi_omics_rosmap")
        assert "tensorflow" not in sys.modules


class Server(http.server.ThreadingHTTPServer):
    """Serves ``content``; breaks the connection after ``breaks[i]`` bytes of the i-th answer."""

    def __init__(self, content: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.breaks = content, True, []
        self.tag, self.asked = '"v1"', []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/folder/data.bin"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        if "missing" in self.path:
            return self.send_error(404)
        start = 0
        if wanted and server.ranges and self.headers.get("If-Range", server.tag) == server.tag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        total = len(server.content)
        if start >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Length", str(total - start))
        self.send_header("ETag", server.tag)
        self.end_headers()
        stop = start + server.breaks.pop(0) if server.breaks else total
        self.wfile.write(server.content[start:stop])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server(np.random.default_rng(0).bytes(3_000_000)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class TestDownload:
    def test_says_what_and_keeps_a_checksum(self, server, tmp_path, capsys):
        path = fetch(Remote(server.url), tmp_path)
        assert path == tmp_path / "data.bin" and path.read_bytes() == server.content
        assert f"downloading {server.url} (3 MB) to {tmp_path}" in capsys.readouterr().err
        assert (tmp_path / "data.bin.sha256").read_text() == f"{sha256(path)}  data.bin\n"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["data.bin", "data.bin.sha256"]
        fetch(Remote(server.url), tmp_path)
        assert len(server.asked) == 1, "a file that is there is not downloaded again"

    def test_resumes_after_a_broken_connection(self, server, tmp_path, capsys):
        server.breaks = [1_000_000, 500_000]
        path = fetch(Remote(server.url), tmp_path, pause=0)
        assert path.read_bytes() == server.content
        assert server.asked == [None, "bytes=1000000-", "bytes=1500000-"]
        assert "going on at 1 MB" in capsys.readouterr().err

    def test_resumes_in_a_later_run(self, server, tmp_path):
        server.breaks = [1_000_000]
        with pytest.raises(InputError, match=r"tried 1 times, have 1 MB.*run again"):
            fetch(Remote(server.url), tmp_path, attempts=1)
        assert not (tmp_path / "data.bin").exists()
        assert fetch(Remote(server.url), tmp_path).read_bytes() == server.content
        assert server.asked[-1] == "bytes=1000000-"

    @pytest.mark.parametrize("reason", ["no ranges", "file changed"])
    def test_starts_over_when_it_must(self, server, tmp_path, reason):
        server.breaks = [1_000_000]
        with pytest.raises(InputError):
            fetch(Remote(server.url), tmp_path, attempts=1)
        if reason == "no ranges":
            server.ranges = False
        else:
            server.content, server.tag = bytes(reversed(server.content)), '"v2"'
        assert fetch(Remote(server.url), tmp_path).read_bytes() == server.content

    def test_whole_part_needs_only_a_rename(self, server, tmp_path):
        (tmp_path / "data.bin.part").write_bytes(server.content)
        assert fetch(Remote(server.url), tmp_path).read_bytes() == server.content

    def test_part_that_is_too_long_is_thrown_away(self, server, tmp_path):
        (tmp_path / "data.bin.part").write_bytes(server.content + b"more")
        assert fetch(Remote(server.url), tmp_path, pause=0).read_bytes() == server.content

    def test_known_size_and_checksum(self, server, tmp_path):
        with pytest.raises(InputError, match="3000000 bytes, expected 5: the source has changed"):
            fetch(Remote(server.url, size=5), tmp_path)
        with pytest.raises(InputError, match="not the published file"):
            fetch(Remote(server.url, git_blob="0" * 40), tmp_path)
        assert not list(tmp_path.glob("*"))
        (tmp_path / "same").write_bytes(server.content)
        blob = git_blob(tmp_path / "same")
        assert fetch(Remote(server.url, 3_000_000, blob), tmp_path).exists()

    def test_damage_after_download_is_noticed(self, server, tmp_path):
        path = fetch(Remote(server.url), tmp_path)
        path.write_bytes(server.content[:-1] + b"?")
        with pytest.raises(InputError, match=r"does not match its checksum.*delete it"):
            fetch(Remote(server.url), tmp_path)

    def test_missing_file_and_no_server(self, server, tmp_path):
        with pytest.raises(InputError, match="404"):
            fetch(Remote(server.url.replace("data", "missing")), tmp_path)
        with pytest.raises(InputError, match=r"cannot download http://127.0.0.1:9/x.*put it in"):
            fetch(Remote("http://127.0.0.1:9/x"), tmp_path, attempts=2, pause=0)

    def test_load_downloads(self, server, tmp_path, rosmap, monkeypatch):
        monkeypatch.setattr(
            multiomics,
            "fetch",
            lambda remote, folder: (
                folder.mkdir(parents=True, exist_ok=True),
                (folder / remote.name).write_bytes((rosmap / remote.name).read_bytes()),
            ),
        )
        assert (
            len(multiomics.load("rosmap", None, tmp_path / "cache", download=True).test.labels) == 4
        )
        assert len(multiomics.load("rosmap", None, tmp_path / "cache").test.labels) == 4


class TestUnpack:
    def archive(self, folder: Path, *names: str) -> Path:
        path = folder / "data.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = 5
                tar.addfile(member, io.BytesIO(b"hello"))
        return path

    def test_unpacks_once(self, tmp_path):
        archive = self.archive(tmp_path, "top/a", "top/b/c")
        assert (unpack(archive, "top") / "b" / "c").read_bytes() == b"hello"
        archive.unlink()
        assert unpack(archive, "top") == tmp_path / "top"

    def test_bad_archives_leave_nothing(self, tmp_path):
        for names, message in ((("../evil",), "cannot be unpacked"), (("a",), "no folder top")):
            with pytest.raises(InputError, match=message):
                unpack(self.archive(tmp_path, *names), "top")
        archive = self.archive(tmp_path, "top/a")
        archive.write_bytes(archive.read_bytes()[:40])
        with pytest.raises(InputError, match="cannot be unpacked"):
            unpack(archive, "top")
        assert [p.name for p in tmp_path.iterdir()] == ["data.tar.gz"]
        assert not (tmp_path.parent / "evil").exists()


class TestPreprocess:
    def test_carve_validation_keeps_proportions(self):
        labels = np.repeat([0, 1, 2], [50, 30, 20]).astype(np.int32)
        split = Split({"x": np.arange(100.0)[:, None]}, labels)
        train, validation = carve_validation(split, 0.2, seed=3)
        assert np.bincount(validation.labels).tolist() == [10, 6, 4]
        rows = np.concatenate([train.inputs["x"][:, 0], validation.inputs["x"][:, 0]])
        np.testing.assert_array_equal(np.sort(rows), np.arange(100))
        again = carve_validation(split, 0.2, seed=3)[1]
        np.testing.assert_array_equal(again.inputs["x"], validation.inputs["x"])
        other = carve_validation(split, 0.2, seed=4)[1]
        assert not np.array_equal(other.inputs["x"], validation.inputs["x"])

    def test_carve_validation_refuses(self):
        tiny = Split({"x": np.ones((3, 1))}, np.array([0, 0, 1], np.int32))
        with pytest.raises(InputError, match=r"cannot carve 0.5 of 3 rows"):
            carve_validation(tiny, 0.5, seed=0)
        with pytest.raises(ValueError, match=r"labels \[N\]"):
            carve_validation(Split({}, np.ones((3, 2))), 0.5, seed=0)

    def test_min_max_uses_train_only(self):
        train = Split({"x": np.array([[1, 7], [3, 7]], np.float32)}, np.zeros(2, np.int32))
        test = Split({"x": np.array([[5, 8]], np.float32)}, np.zeros(1, np.int32))
        scaled, other = min_max(train, test)
        np.testing.assert_array_equal(scaled.inputs["x"], [[0, 0], [1, 0]])
        np.testing.assert_array_equal(other.inputs["x"], [[2, 1]])
        assert scaled.inputs["x"].dtype == np.float32 and train.inputs["x"][0, 0] == 1


class TestErrors:
    def test_exit_cleanly(self, capsys):
        @exit_cleanly()
        def main(error):
            raise error

        for error, status, line in (
            (InputError("bad\n file"), 2, "error: bad file\n"),
            (KeyboardInterrupt(), 130, "interrupted\n"),
        ):
            with pytest.raises(SystemExit) as caught:
                main(error)
            assert caught.value.code == status
            assert capsys.readouterr().err == line
        with pytest.raises(ZeroDivisionError):
            main(ZeroDivisionError())

    def test_description(self):
        nothing = Split({}, np.zeros(0))
        assert Dataset("X", "real", (), nothing, None, nothing).description == "X"
        sample = Dataset("X", "sample", (), nothing, None, nothing)
        assert sample.description == "X sample (synthetic)"
