"""The page as a reader has it: headless Chromium over a file, driven through its debugging pipe."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tfm.analysis.page import Alignment, Attention, Lens, Page, attention_page

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium or Chrome in the path')

SCRIPT = '</script><script>window.broken = 1</script>'
SOURCE = ['▁six', 'ty', '-', '▁seven', '&amp;', '<img src=x onerror="window.broken=2">', SCRIPT, '</s>']
TARGET = ['<s>', '▁sieben', 'und', '▁sech', 'zig', '\u2028', '\u05d0\u05d1']

# The browser wants its pipe as file descriptors 3 and 4, which may be in use here.
LAUNCH = '''
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
'''


class Browser:
  """Chromium with one empty page; what it says of requests and errors is kept."""

  def __init__(self, folder: Path, width: int = 1400, height: int = 1000):
    (theirs_in, self._in), (self._out, theirs_out) = os.pipe(), os.pipe()
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
    self._process = subprocess.Popen(
        [sys.executable, '-c', LAUNCH, *map(str, ends), CHROMIUM, '--headless', '--remote-debugging-pipe',
         '--no-first-run', '--disable-gpu', '--disable-dev-shm-usage', '--disable-background-networking',
         f'--user-data-dir={folder}',
         *(['--no-sandbox'] if os.geteuid() == 0 else [])],
        pass_fds=ends, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for end in (theirs_in, theirs_out, *ends):
      os.close(end)
    self._number, self._rest, self._session = 0, b'', None
    self.requests, self.errors = [], []
    target = self.call('Target.createTarget', url='about:blank')['targetId']
    self._session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
    for domain in ('Page', 'Runtime', 'Network', 'Log'):
      self.call(f'{domain}.enable')
    self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)

  def call(self, method: str, **params):
    self._number += 1
    message = {'id': self._number, 'method': method, 'params': params}
    if self._session is not None:
      message['sessionId'] = self._session
    os.write(self._in, json.dumps(message).encode() + b'\0')
    while (answer := self._next()).get('id') != self._number:
      self._keep(answer)
    if 'error' in answer:
      raise RuntimeError(f'{method}: {answer["error"]}')
    return answer['result']

  @contextlib.contextmanager
  def attached(self, target: str):
    """Inside, calls go to this target."""
    before = self._session
    self._session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
    for domain in ('Runtime', 'Network', 'Log'):
      self.call(f'{domain}.enable')
    yield
    self._session = before

  def _next(self) -> dict:
    while b'\0' not in self._rest:
      piece = os.read(self._out, 1 << 20)
      if not piece:
        raise RuntimeError('Chromium ended before it answered.')
      self._rest += piece
    message, self._rest = self._rest.split(b'\0', 1)
    return json.loads(message)

  def _keep(self, event: dict) -> None:
    if event.get('method') == 'Network.requestWillBeSent':
      self.requests.append(event['params']['request']['url'])
    elif event.get('method') == 'Runtime.exceptionThrown':
      self.errors.append(event['params']['exceptionDetails'])
    elif event.get('method') == 'Log.entryAdded':
      self.errors.append(event['params']['entry'])
    elif event.get('method') == 'Runtime.consoleAPICalled':
      self.errors.append(event['params']['args'])

  def open(self, path: Path) -> float:
    """Seconds until the page of a file has been drawn."""
    self.requests.clear()
    self.errors.clear()
    begin = time.perf_counter()
    self.call('Page.navigate', url=path.as_uri())
    self.run("""new Promise(done => {
      const drawn = () => requestAnimationFrame(() => requestAnimationFrame(done));
      document.readyState === 'complete' ? drawn() : addEventListener('load', drawn);
    })""")
    return time.perf_counter() - begin

  def run(self, code: str):
    found = self.call('Runtime.evaluate', expression=code, awaitPromise=True, returnByValue=True)
    if 'exceptionDetails' in found:
      raise RuntimeError(str(found['exceptionDetails']))
    return found['result'].get('value')

  def mouse(self, selector: str, number: int = 0, click: bool = False) -> None:
    """To the middle of the visible element number `number` of a selector."""
    x, y = self.run(f"""(() => {{
      const shown = [...document.querySelectorAll({json.dumps(selector)})].filter(each => each.offsetParent);
      shown[{number}].scrollIntoView({{block: 'nearest'}});
      const box = shown[{number}].getBoundingClientRect();
      return [box.x + box.width / 2, box.y + box.height / 2];
    }})()""")
    self.call('Input.dispatchMouseEvent', type='mouseMoved', x=x, y=y)
    for kind in ('mousePressed', 'mouseReleased') if click else ():
      self.call('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', clickCount=1)

  def key(self, name: str) -> None:
    for kind in ('keyDown', 'keyUp'):
      self.call('Input.dispatchKeyEvent', type=kind, key=name, code=name)

  def text(self, selector: str, number: int = 0) -> str:
    return self.run(f"""[...document.querySelectorAll({json.dumps(selector)})].filter(
        each => each.offsetParent)[{number}].textContent""")

  def screenshot(self, path: Path) -> None:
    path.write_bytes(base64.b64decode(self.call('Page.captureScreenshot', captureBeyondViewport=True)['data']))

  def close(self) -> None:
    self._session = None
    with contextlib.suppress(RuntimeError, OSError):
      self.call('Browser.close')
    try:
      self._process.wait(10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    os.close(self._in)
    os.close(self._out)


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  browser = Browser(tmp_path_factory.mktemp('chromium'))
  yield browser
  browser.close()


def weights(*shape: int, causal: bool = False) -> np.ndarray:
  scores = 3 * np.random.default_rng(0).normal(size=shape)
  if causal:
    scores = np.where(np.tri(*shape[-2:], dtype=bool), scores, -np.inf)
  scores = np.exp(scores)
  return scores / scores.sum(axis=-1, keepdims=True)


CROSS = weights(2, 3, len(TARGET), len(SOURCE))


def page(source=SOURCE, target=TARGET, layers=2, heads=3, cross=CROSS) -> Page:
  S, T = len(source), len(target)
  following = [*target[1:], '</s>']
  rng = np.random.default_rng(1)
  probability = -np.sort(-rng.dirichlet(np.ones(6), (layers, T))[..., :5])
  tokens = [[[target[(n + t + k) % T] for k in range(5)] for t in range(T)] for n in range(layers)]
  lens = Lens(target, [f'layer {n + 1}' for n in range(layers)], tokens, probability, following,
              rng.random((layers, T)), rng.integers(1, 9000, (layers, T)))
  return attention_page([
      Attention('Encoder', weights(layers, heads, S, S), source, source, same=True),
      Attention('Decoder', weights(layers, heads, T, T, causal=True), target, target, same=True, predicted=following),
      Attention('Cross', cross, target, source, predicted=following),
  ], title=f'{SCRIPT} & more', alignment=Alignment('Cross', (0, S - 1), (0, T - 1), [0, 3], [0, 2]), lens=lens)


def assert_quiet(browser: Browser, path: Path) -> None:
  assert browser.errors == []
  assert browser.requests == [path.as_uri()], 'nothing but the file itself is asked for'
  assert browser.run('window.broken') is None


def test_every_view_shows_its_weights_and_tokens_stay_text(browser, tmp_path):
  path = page().write(tmp_path / 'page.html')
  browser.open(path)
  assert browser.run('document.title') == browser.text('h1') == f'{SCRIPT} & more'
  tabs = browser.run("[...document.querySelectorAll('[role=tab]')].map(each => each.textContent)")
  assert tabs == ['Encoder', 'Decoder', 'Cross', 'Alignment', 'Predictions by layer']
  assert browser.run("[...document.querySelectorAll('.token')].map(each => each.textContent)") == [*SOURCE, *SOURCE]

  browser.mouse('[role=tab]', 2, click=True)
  assert browser.run("document.querySelectorAll('[role=tabpanel]:not([hidden])').length") == 1
  browser.mouse('.thumbs button', 4, click=True)
  assert browser.text('h2', 1) == 'Layer 2, head 2'
  browser.mouse('.token', 3)  # a query: it looks at keys
  row_S = CROSS[1, 1, 3]
  best = int(row_S.argmax())
  said = browser.text('.said')
  assert said.startswith(f'{TARGET[3]} (4), about to write {TARGET[4]}, looks at: {SOURCE[best]} ')
  assert abs(int(said.split(' %')[0].rsplit(' ', 1)[1]) - 100 * row_S[best]) <= 0.7
  browser.mouse('.token', len(TARGET) + best)  # a key: queries look at it
  column_T = CROSS[1, 1, :, best]
  said = browser.text('.said')
  assert said.startswith(f'{SOURCE[best]} ({best + 1}) is looked at by: {TARGET[int(column_T.argmax())]}')
  browser.mouse('h1')
  assert browser.text('.said').startswith('Point at a token')

  browser.mouse('[role=tab]', 3, click=True)
  assert browser.run("[...document.querySelectorAll('.links .token')].map(each => each.textContent)") == [
      'sixty-', ''.join(SOURCE[3:7]).removeprefix('▁'), 'siebenund', ''.join(TARGET[3:]).removeprefix('▁')]
  browser.mouse('[role=tab]', 4, click=True)
  browser.mouse('tbody td', 2)
  assert browser.text('h2', 0) == f'layer 1, position 3, reading {TARGET[2]}'
  assert browser.run("document.querySelectorAll('.guesses .track').length") == 5
  assert_quiet(browser, path)


@pytest.mark.parametrize('indexing, first', {'output': 0, 'input': 1}.items())
def test_an_alignment_is_indexed_both_ways(indexing, first, browser, tmp_path):
  browser.open(page().write(tmp_path / 'page.html'))
  browser.mouse('[role=tab]', 3, click=True)
  browser.mouse(f'input[value={indexing}]', click=True)
  browser.mouse('.links .token', 2)  # the first target word: of two tokens
  pattern_HxTxS = CROSS[1, :, first:first + 2]
  source_words = [pattern_HxTxS[..., begin:end].max(axis=(1, 2)).mean() for begin, end in ((0, 3), (3, 7))]
  shares = [int(part.split(' %')[0].rsplit(' ', 1)[-1]) for part in browser.run(
      "[...document.querySelectorAll('.piece')].filter(each => each.offsetParent).map(each => each.textContent)")]
  np.testing.assert_allclose(sorted(shares), sorted(100 * np.array(source_words)), atol=0.7)


def test_everything_is_within_reach_of_the_keyboard(browser, tmp_path):
  browser.open(page().write(tmp_path / 'page.html'))
  browser.run("document.getElementById('tab0').focus()")
  browser.key('ArrowRight')
  assert browser.text('[role=tab][aria-selected=true]') == 'Decoder'
  browser.run("document.querySelector('#view1 .thumbs button').focus()")
  browser.key('ArrowDown')
  browser.key('ArrowRight')
  assert browser.text('h2', 1) == 'Layer 2, head 2'
  browser.run("document.querySelector('#view1 .token').focus()")
  browser.key('ArrowRight')
  assert browser.text('.said').startswith(f'{TARGET[1]} (2), about to write {TARGET[2]}, looks at: ')
  stops = browser.run("""[...document.querySelectorAll('#view1 button')].filter(each => each.tabIndex === 0).length""")
  assert stops == 3, 'one stop for the heads and one for each list of tokens'


def test_a_frame_of_a_notebook_shows_the_page_and_asks_for_nothing(browser, tmp_path):
  path = tmp_path / 'notebook.html'
  path.write_text(f'<!doctype html><meta charset="utf-8">{2 * page()._repr_html_()}', encoding='utf-8')
  browser.open(path)
  frames = [target['targetId'] for target in browser.call('Target.getTargets')['targetInfos']
            if target['url'] == 'about:srcdoc']
  assert len(frames) == 2, 'each in a process of its own'
  for frame in frames:
    with browser.attached(frame):
      assert browser.text('h1') == f'{SCRIPT} & more'
      browser.run("document.querySelectorAll('[role=tab]').forEach(tab => tab.click())")
      assert browser.text('[role=tab][aria-selected=true]') == 'Predictions by layer'
      assert browser.run('window.broken') is None
  assert browser.errors == []
  assert set(browser.requests) <= {path.as_uri(), 'about:srcdoc'}


def test_a_large_page_opens_at_once(browser, tmp_path):
  words = [f'▁w{i}' for i in range(64)]
  path = page(words, words, 6, 8, weights(6, 8, 64, 64)).write(tmp_path / 'page.html')
  seconds = browser.open(path)
  views = browser.run("""(() => {
    const begin = performance.now(), tabs = document.querySelectorAll('[role=tab]');
    tabs.forEach(tab => tab.click());
    return (performance.now() - begin) / 1000;
  })()""")
  print(f'{path.stat().st_size / 1e6:.2f} MB, drawn after {seconds:.2f} s; all views one after the other {views:.2f} s')
  assert_quiet(browser, path)
