"""The service: what it answers, what it refuses and how, batches across requests; its end in a process."""

import asyncio
import base64
import gzip
import io
import json
import threading
import time
from types import SimpleNamespace

import httpx
import nibabel
import numpy as np
import pytest
from fastapi import HTTPException
from fastapi.testclient import TestClient
from PIL import Image

from benchmarks import serve_load
from iqe_jax import batching, calibration, export, serve, service
from iqe_jax.batching import Histogram, Limits
from iqe_jax.config import Config
from iqe_jax.detector import Detector, Prediction
from iqe_jax.service import Service
from iqe_jax.web import create_app
from tests.runs import small_run

pytestmark = pytest.mark.usefixtures("quick_compile")
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 50, 40, 3), np.uint8)
LIMITS = Limits(batch_size=4, max_mb=4, max_megapixels=0.5, max_frames=10, max_requests=32, max_total_mb=40, wait_ms=20)
TOKEN = "a secret of some length"


def png(image) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def picture(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


@pytest.fixture(scope="module")
def detector(golden_model):
    return Detector(*golden_model, zero_shot=False, batch_size=4)


@pytest.fixture(scope="module")
def calibrated():
    draw = np.random.default_rng(0)
    scores = np.r_[draw.normal(0.3, 0.1, 30), draw.normal(0.5, 0.1, 30)]
    return calibration.fit(scores, np.repeat([0, 1], 30))


@pytest.fixture(scope="module")
def logged():
    return SimpleNamespace(lines=[], names=[])


@pytest.fixture(scope="module")
def app(detector, calibrated, logged):
    about = export.describe(Config(), detector, {"chosen": "last", "chosen_on_test_data": False}, calibrated)
    return create_app(
        detector,
        about=about,
        calibrated=calibrated,
        limits=LIMITS,
        log=logged.lines.append,
        log_name=logged.names.append,
    )


@pytest.fixture(scope="module")
def client(app):
    with TestClient(app, base_url="http://localhost:8000") as client:
        yield client


def post(client, content, address="/predict", kind="image/png", **query):
    return client.post(address, content=content, headers={"content-type": kind}, params=query)


def test_it_says_what_the_detector_says(client, detector, calibrated):
    expected = detector(PIXELS[0])
    form = client.post("/predict", files={"file": ("scan.png", png(PIXELS[0]))})
    for answer in (form, post(client, png(PIXELS[0])), post(client, png(PIXELS[0]), kind="application/octet-stream")):
        assert answer.status_code == 200
        found = answer.json()
        assert found["score"] == pytest.approx(float(expected.score), abs=1e-5)
        assert found["probability"] == pytest.approx(calibrated.probability(np.array([found["score"]]))[0])
        assert found["decision"] == ("anomalous" if found["score"] >= calibrated.threshold else "normal")
        assert (found["kind"], found["frame"], len(found["frames"])) == ("image", 0, 1)
        assert found["frames"][0]["map"] is None
        assert (found["frames"][0]["height"], found["frames"][0]["width"]) == (50, 40)


def test_a_prevalence_moves_the_probability(detector, calibrated):
    rare = Service(detector, calibrated, LIMITS, None, 0.01)._said(0.45)
    pool = Service(detector, calibrated, LIMITS, None)._said(0.45)
    assert 0 < rare["probability"] < pool["probability"] < 1
    assert rare["probability"] == pytest.approx(calibrated.probability(np.array([0.45]), 0.01)[0])
    assert Service(detector, None, LIMITS, None)._said(0.45) == {"probability": None, "decision": None}


def test_pictures_come_when_asked_for(client, detector):
    found = post(client, png(PIXELS[1]), include=["image", "map", "overlay"]).json()["frames"][0]
    np.testing.assert_array_equal(picture(found["image"]), PIXELS[1])
    values = picture(found["map"])
    np.testing.assert_allclose(values / 65535, detector(PIXELS[1]).anomaly_map, atol=2e-5)
    assert picture(found["overlay"]).shape == (50, 40, 3)
    answer = post(client, png(PIXELS[1]), "/heatmap")
    assert answer.headers["content-type"] == "image/png"
    assert float(answer.headers["x-score"]) == pytest.approx(found["score"], rel=1e-4)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), picture(found["overlay"]))
    raw = client.post("/heatmap?kind=map", files={"file": png(PIXELS[1])})
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(raw.content))), values)


def volume(frames: int) -> bytes:
    import nibabel

    values = np.random.default_rng(1).integers(0, 1000, (8, 9, frames)).astype(np.int16)
    return nibabel.Nifti1Image(values, np.eye(4)).to_bytes()


def test_volumes_frame_by_frame(client):
    answer = post(client, volume(6), kind="application/octet-stream", include="map")
    found = answer.json()
    assert found["kind"] == "nifti"
    scores = [frame["score"] for frame in found["frames"]]
    assert len(scores) == 6 and found["score"] == max(scores) and found["frame"] == int(np.argmax(scores))
    assert all(picture(frame["map"]).shape == (40, 40) for frame in found["frames"])
    top = post(client, volume(6), "/heatmap", "application/octet-stream")
    assert int(top.headers["x-frame"]) == found["frame"]
    one = post(client, volume(6), "/heatmap", "application/octet-stream", frame=2)
    assert float(one.headers["x-score"]) == pytest.approx(scores[2], abs=1e-5)
    across = post(client, volume(6), "/heatmap", "application/octet-stream", axis=0, frame=5)
    assert Image.open(io.BytesIO(across.content)).size == (9, 6)
    windowed = post(client, volume(6), kind="application/octet-stream", centre=500, width=10).json()
    assert windowed["score"] != found["score"]


@pytest.mark.parametrize(
    ("content", "settings", "status", "words"),
    [
        (b"", {}, 422, "is empty"),
        (b"GIF89a", {}, 422, "of no kind that is read"),
        (png(PIXELS[0])[:900], {}, 422, "damaged or cut short"),
        (b"{}", {"kind": "application/json"}, 415, "expected a form with a file, or an image"),
        (b"no boundary", {"kind": "multipart/form-data"}, 422, "the form is broken"),
        (b"--x\r\n", {"kind": "multipart/form-data; boundary=x"}, 422, "form"),
        (png(np.zeros((800, 800, 3), np.uint8)), {}, 413, "more than the 500000 allowed"),
        (bytes(5_000_000), {}, 413, "larger than the 4 MB allowed"),
        (png(PIXELS[0]), {"width": 3}, 422, "give both or neither"),
        (png(PIXELS[0]), {"axis": 3}, 422, "axis: "),
        (png(PIXELS[0]), {"include": "everything"}, 422, "include.0: "),
        (png(PIXELS[0]), {"address": "/heatmap", "frame": 1}, 422, "there is no frame 1"),
        (volume(11), {}, 413, "11 frames, more than the 10 allowed"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(client, content, settings, status, words):
    answer = post(client, content, **settings)
    assert answer.status_code == status
    assert words in answer.json()["detail"] and "\n" not in answer.json()["detail"]


def test_a_body_without_length_is_stopped_at_the_limit(client):
    content = (bytes(1_000_000) for _ in range(100))
    answer = client.post("/predict", content=content, headers={"content-type": "image/png"})
    assert answer.status_code == 413


def test_forms_with_no_file_or_several(client):
    assert "no file in its field file" in client.post("/predict", files={"other": b"1"}).json()["detail"]
    two = [("file", ("a.png", b"1")), ("file", ("b.png", b"2"))]
    assert "several files" in client.post("/predict", files=two).json()["detail"]


def test_names_are_shown_to_the_sender_and_logged_only_where_asked(client, logged):
    logged.lines.clear(), logged.names.clear()
    answer = client.post("/predict", files={"file": ("../x\\miller_anna.png", b"1")})
    assert answer.json()["detail"].startswith("miller_anna.png ")
    client.post("/predict", files={"file": ("miller_anna.png", png(PIXELS[0]))})
    client.get("/miller_anna")
    assert logged.lines == ["POST /predict 422", "POST /predict 200", "GET other 404"]
    assert len(logged.names) == 1 and logged.names[0].startswith("miller_anna.png: 1 frames")


def test_nothing_is_written_to_disk(client, monkeypatch):
    import tempfile

    def refuse(*_, **__):
        raise AssertionError("a temporary file")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    large = np.random.default_rng(2).integers(0, 256, (700, 700, 3), np.uint8)
    assert client.post("/predict", files={"file": ("scan.png", png(large))}).status_code == 200


def test_concurrent_requests_share_batches(client, detector):
    before = client.get("/metrics").text
    answers: dict[int, float] = {}

    def ask(i):
        answers[i] = post(client, png(PIXELS[i])).json()["score"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_allclose([answers[i] for i in range(6)], detector(PIXELS).score, atol=1e-5)

    def count(text, name):
        return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(name + " ")))

    after = client.get("/metrics").text
    batches = count(after, "iqe_jax_batch_size_count") - count(before, "iqe_jax_batch_size_count")
    assert count(after, "iqe_jax_images_total") - count(before, "iqe_jax_images_total") == 6
    assert 2 <= batches < 6
    assert count(after, "iqe_jax_queue_length") == count(after, "iqe_jax_requests_inside") == 0


def test_metrics_are_prometheus_text(client):
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    kinds = {}
    for line in answer.text.splitlines():
        if line.startswith("# TYPE "):
            kinds[line.split()[2]] = line.split()[3]
        elif not line.startswith("#"):
            name = line.split("{")[0].split()[0]
            for ending in ("_bucket", "_sum", "_count"):
                name = name.removesuffix(ending) if name.removesuffix(ending) in kinds else name
            assert name in kinds, line
            float(line.rsplit(" ", 1)[1])
    assert set(kinds.values()) == {"counter", "gauge", "histogram"}


def test_histograms_are_cumulative():
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 9):
        histogram.add(value)
    assert histogram.lines("x") == [
        'x_bucket{le="1"} 2',
        'x_bucket{le="2"} 3',
        'x_bucket{le="+Inf"} 4',
        "x_sum 12.000000",
        "x_count 4",
    ]


def test_strange_hosts_and_other_origins_are_refused(client):
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/health", headers={"host": "[::1]:8000"}).status_code == 200
    assert client.get("/health", headers={"host": "LocalHost:8000"}).status_code == 200
    own = {"origin": "http://localhost:8000", "content-type": "image/png"}
    assert client.post("/predict", content=png(PIXELS[0]), headers=own).status_code == 200
    for origin in ("https://evil.example", "null", "http://localhost:9", "http://[::1"):
        answer = client.post("/predict", content=png(PIXELS[0]), headers={**own, "origin": origin})
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


def test_the_page_loads_nothing_from_elsewhere(client):
    first, second = client.get("/"), client.get("/")
    policy = first.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    assert policy != second.headers["content-security-policy"]  # a nonce is used once
    assert "http://" not in first.text and "https://" not in first.text and "{nonce}" not in first.text
    assert first.headers["x-content-type-options"] == "nosniff"
    assert client.get("/docs").status_code == 404
    answer = post(client, png(PIXELS[0]), "/heatmap")  # may be a patient's, and is no page
    assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert answer.headers["cache-control"] == first.headers["cache-control"] == "no-store"


def test_what_the_model_is(client):
    found = client.get("/model").json()
    assert found["weights"]["chosen"] == "last" and found["image_size"] == 40
    assert found["calibration"]["threshold"] is not None
    assert client.get("/health").json() == {"status": "ready", "token_required": False}


def test_a_token_is_asked_for(detector):
    app = create_app(detector, about={"a": 1}, limits=LIMITS, token=TOKEN, hosts=("*",))
    client = TestClient(app)  # not entered: what needs no model needs no start
    for wrong in ({}, {"authorization": "Bearer nearly"}, {"authorization": "Basic x"}, {"authorization": "Bearer é"}):
        wrong = {name: value.encode() for name, value in wrong.items()}
        for method, address in (("POST", "/predict"), ("POST", "/heatmap"), ("GET", "/model"), ("GET", "/metrics")):
            answer = client.request(method, address, headers=wrong)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/model", headers={"authorization": f"Bearer {TOKEN}"}).json() == {"a": 1}
    assert client.get("/health").json()["token_required"]
    assert client.get("/").status_code == 200


class Stuck(Detector):
    """A detector that waits until it is let go; `gate` is shared by the copies for each batch size."""

    gate = SimpleNamespace(wait=lambda _: None)

    def __call__(self, images):
        self.gate.wait(20)
        return super().__call__(images)


def test_a_full_house_is_refused_and_a_fault_hits_only_its_batch(golden_model):
    stuck = Stuck(*golden_model, zero_shot=False)
    gate, limits = threading.Event(), Limits(batch_size=1, max_requests=2, max_total_mb=1, max_mb=1)
    app = create_app(stuck, about={}, limits=limits)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        stuck.gate.wait = gate.wait
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(post(client, png(PIXELS[0])))) for _ in range(2)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 10
        while "requests_inside 2" not in client.get("/metrics").text:
            assert time.monotonic() < end
        refused = post(client, png(PIXELS[0]))
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        gate.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        assert "iqe_jax_refusals_total 1" in client.get("/metrics").text

        def fail(_):
            raise MemoryError

        stuck.gate.wait = fail
        failed = post(client, png(PIXELS[0]))
        assert failed.status_code == 500 and "MemoryError" in failed.json()["detail"]
        stuck.gate.wait = lambda _: None
        assert post(client, png(PIXELS[0])).status_code == 200
        assert "iqe_jax_failures_total 1" in client.get("/metrics").text


def test_unpacked_volumes_count(golden_model):
    volume = nibabel.Nifti1Image(np.zeros((1000, 1000, 3)), np.eye(4))  # 24 MB, packed a few kB
    content, kind = gzip.compress(volume.to_bytes()), "application/gzip"
    stuck = Stuck(*golden_model, zero_shot=False)
    app = create_app(stuck, about={}, limits=Limits(max_total_mb=23))
    with TestClient(app, base_url="http://localhost") as client:
        refused = post(client, content, kind=kind)
        assert refused.status_code == 413 and "takes 24 MB, more than the 23 allowed" in refused.json()["detail"]
        assert post(client, png(PIXELS[0])).status_code == 200
    app = create_app(stuck, about={}, limits=Limits(max_total_mb=30))
    with TestClient(app, base_url="http://localhost") as client:
        open_now, gate, answers = threading.Event(), threading.Event(), []
        stuck.gate.wait = lambda seconds: open_now.set() or gate.wait(seconds)
        first = threading.Thread(target=lambda: answers.append(post(client, content, kind=kind)))
        first.start()
        assert open_now.wait(20)
        refused = post(client, content, kind=kind)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        gate.set()
        first.join()
        assert answers[0].status_code == 200
        assert post(client, content, kind=kind).status_code == 200  # the room was given back


def test_a_client_that_has_gone_takes_no_other_along():
    async def batches():
        gone, here, failed = (asyncio.get_running_loop().create_future() for _ in range(3))
        gone.cancel()
        batching._deliver([gone, here], Prediction(np.array([0.1, 0.2]), np.zeros((2, 4, 4))))
        assert (await here)[0] == 0.2
        batching._fail([gone, failed], MemoryError())
        with pytest.raises(MemoryError):
            await failed

    asyncio.run(batches())


def test_uploads_that_are_too_much_together_are_refused(detector):
    house = Service(detector, None, Limits(max_mb=1, max_total_mb=1), None)
    house.bytes = 900_000  # of others

    async def stream():
        yield bytes(200_000)

    upload = service._Upload(house)
    with pytest.raises(HTTPException, match="1 MB are inside already") as refused:
        asyncio.run(upload._body(SimpleNamespace(headers={}, stream=stream)))
    assert refused.value.status_code == 503
    upload.release()
    assert house.bytes == 900_000


def test_a_slow_upload_is_ended(detector):
    app = create_app(detector, about={}, limits=Limits(upload_seconds=0.05), hosts=("*",))

    async def ask():
        async def slow():
            yield b"1"
            await asyncio.sleep(5)

        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/predict", content=slow(), headers={"content-type": "image/png"})

    assert asyncio.run(ask()).status_code == 408


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"host": "0.0.0.0"}, "set \\$IQE_JAX_TOKEN"),
        ({"host": "192.168.1.5"}, "reached from other machines"),
        ({"token": "short"}, "16 plain characters"),
        ({"prevalence": 1.0}, "--prevalence is 1.0"),
        ({"port": 70000}, "--port is 70000"),
        ({"limits": Limits(max_mb=0)}, "--max-mb is 0"),
        ({"limits": Limits(max_mb=float("inf"))}, "--max-mb is inf"),
    ],
)
def test_options_that_are_not_safe_or_cannot_work(settings, words, monkeypatch, tmp_path):
    monkeypatch.delenv("IQE_JAX_TOKEN", raising=False)
    with pytest.raises(ValueError, match=words):
        serve.check(serve.Options(tmp_path, **settings))


def test_options_that_are_fine(monkeypatch, tmp_path):
    monkeypatch.setenv("IQE_JAX_TOKEN", TOKEN)
    assert serve.check(serve.Options(tmp_path, host="0.0.0.0")) == (TOKEN, ("*",))
    assert serve.check(serve.Options(tmp_path, host="0.0.0.0", allow_host=("scans.example",)))[1] == ("scans.example",)
    monkeypatch.delenv("IQE_JAX_TOKEN")
    assert serve.check(serve.Options(tmp_path))[0] is None
    assert serve.is_loopback("::1") and serve.is_loopback("127.8.8.8") and not serve.is_loopback("example.org")


@pytest.mark.parametrize(("log", "lines", "names"), [("none", 0, 0), ("requests", 1, 0), ("names", 1, 1)])
def test_what_is_asked_for_is_what_is_served(tmp_path, monkeypatch, log, lines, names):
    made = {}
    monkeypatch.setattr("iqe_jax.web.create_app", lambda detector, **settings: made.update(settings))
    monkeypatch.setattr(serve, "_server", lambda *_: SimpleNamespace(run=lambda sockets: sockets[0].close()))
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    run = small_run(tmp_path / "run")
    calibration.fit(np.linspace(0, 1, 40), np.repeat([0, 1], 20)).save(run)
    line = [str(run), "--port", "0", "--token", TOKEN, "--allow-host", "scans.example"]
    serve.main([*line, "--prevalence", "0.1", "--max-frames", "3", "--log", log])
    assert (made["token"], made["prevalence"], made["limits"].max_frames) == (TOKEN, 0.1, 3)
    assert made["about"]["prevalence"] == 0.1
    assert made["hosts"] == ("localhost", "127.0.0.1", "[::1]", "127.0.0.1", "scans.example")
    assert (made["log"] is not None, made["log_name"] is not None) == (bool(lines), bool(names))


def test_missing_packages_and_taken_ports_are_named(monkeypatch, tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SystemExit, match="choose another --port"):
            serve.main([str(tmp_path), "--port", str(taken.getsockname()[1])])
    compiling = serve._bind("127.0.0.1", 0)  # a service that does not listen yet
    with compiling, pytest.raises(OSError, match="choose another --port"):
        serve._bind("127.0.0.1", compiling.getsockname()[1])
    monkeypatch.setattr(serve, "PACKAGES", ("fastapi", "no_such_package"))
    with pytest.raises(SystemExit, match=r"needs no_such_package: pip install '\.\[serve\]'"):
        serve.main([str(tmp_path)])


def test_generated_requests_find_no_fault(app, client):
    """schemathesis: what the OpenAPI description allows is answered, and never with a fault of the service."""
    import requests
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    tried = 0
    for found in schema.get_all_operations():

        @given(case=found.ok().as_strategy())
        @settings(
            max_examples=20,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def check(case):
            nonlocal tried
            tried += 1
            wanted = case.as_transport_kwargs(base_url="http://localhost:8000")
            sent = requests.Request(**{name: value for name, value in wanted.items() if name != "verify"}).prepare()
            answer = client.request(sent.method, sent.url, content=sent.body, headers=dict(sent.headers))
            # Status, type and form are as described, and none is 500. That bytes are no scan, no schema can say.
            case.validate_response(answer, excluded_checks=[positive_data_acceptance])

        check()
    assert tried >= 40


def test_many_clients_at_once_and_a_good_end(tmp_path):
    """A process of its own: 64 clients for some seconds, none failed, memory steady; SIGTERM answers who is inside."""
    run = small_run(tmp_path / "run")
    process, port = serve_load.start_service(run, "--batch-size", "8", "--max-requests", "48")
    try:
        bodies = [png(image) for image in PIXELS]
        asyncio.run(serve_load.load(port, bodies, 64, 1, process.pid))
        outcome = asyncio.run(serve_load.load(port, bodies, 64, 6, process.pid))
        assert outcome.failed == 0
        assert outcome.status[200] > 50 and outcome.status[503] > 0  # of 64, 48 are let in
        assert outcome.memory[-1] - outcome.memory[0] < 50e6

        answered = []

        def ask():
            answered.append(httpx.post(f"http://127.0.0.1:{port}/predict", files={"file": volume(200)}, timeout=60))

        thread = threading.Thread(target=ask)
        thread.start()
        end = time.monotonic() + 20
        while "requests_inside 1" not in httpx.get(f"http://127.0.0.1:{port}/metrics").text:
            assert time.monotonic() < end and thread.is_alive()
        process.terminate()
        thread.join(60)
        assert answered and answered[0].status_code == 200 and len(answered[0].json()["frames"]) == 200
    finally:
        process.terminate()
        code = process.wait(60)
        process.stderr.close()
    assert code == 0
    assert json.loads((run / "kept.json").read_text())["step"] == 7
