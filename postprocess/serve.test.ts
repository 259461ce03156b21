/** A session with `serve` in a real browser; and requests that no page of ours would send. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import * as tf from '@tensorflow/tfjs';
import { chromium } from 'playwright-core';
import { fixtureJob } from './fixture.ts';
import { type Harvest, harvestDefaults } from './harvest.ts';
import { renderReport } from './page.ts';
import type { LmRun } from './run.ts';
import { startServer } from './serve.ts';

const HOSTILE = '<img src=x onerror="window.hit=1">';
const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'serve-'));
let job: LmRun;
let server: http.Server;
let port = 0;

/** One word, one token: "w5" is 5; anything else is 7, and 7 is a hostile text. */
const tokenizer = {
  encode: (text: string) => ({
    ids: text
      .split(/\s+/)
      .filter(Boolean)
      .map(word => (/^w\d+$/.test(word) ? Number(word.slice(1)) : 7)),
  }),
  decode: (ids: number[]) => ids.map(id => tokenizer.id_to_token(id)).join(' '),
  id_to_token: (id: number) => (id === 7 ? HOSTILE : `w${id}`),
  token_to_id: (text: string) => (/^w\d+$/.test(text) ? Number(text.slice(1)) : undefined),
};

before(async () => {
  await tf.setBackend('cpu');
  const made = await fixtureJob('simple_mlp', folder);
  const data = { ...made.data, tokenizer: tokenizer as unknown as NonNullable<LmRun['data']['tokenizer']> };
  job = { ...made, data };
  const passage = {
    tokens: made.rows[0]!,
    positions: made.rows[0]!.map(() => ({ fired: 0, firing: [], predictions: [] })),
  };
  const harvest: Harvest = {
    ...{ formatVersion: 1, positions: 21, pairPositions: 21, outputTokens: 23, settings: harvestDefaults },
    modules: made.problem.modules.map(({ path: module, offset, C }) => ({
      ...{ path: module, offset, C, alive: 0, meanCi: Array(C).fill(0) },
    })),
    ...{ components: [], passages: [passage], vocabulary: Object.fromEntries(made.rows[0]!.map(t => [t, `w${t}`])) },
  };
  fs.writeFileSync(path.join(folder, 'components.safetensors'), 'for the hash');
  fs.writeFileSync(path.join(folder, 'report.html'), renderReport({ config: {}, metrics: {}, history: [], harvest }));
  server = await startServer(job, 0, { circuitSteps: 3, continuation: 4, tokens: 12 });
  port = (server.address() as AddressInfo).port;
});
after(() => {
  server?.closeAllConnections();
  server?.close();
  fs.rmSync(folder, { recursive: true });
});

interface Reply {
  status: number;
  headers: http.IncomingHttpHeaders;
  body: string;
}
function send(method: string, address: string, headers: http.OutgoingHttpHeaders = {}, body?: string): Promise<Reply> {
  return new Promise((resolve, reject) => {
    const request = http.request({ host: '127.0.0.1', port, method, path: address, headers }, response => {
      let text = '';
      response.setEncoding('utf8').on('data', part => {
        text += part;
      });
      response.on('end', () => resolve({ status: response.statusCode!, headers: response.headers, body: text }));
    });
    request.on('error', reject);
    request.end(body);
  });
}
const JSON_TYPE = { 'Content-Type': 'application/json' };
const post = (address: string, value: unknown, headers = {}) =>
  send('POST', address, { ...JSON_TYPE, ...headers }, JSON.stringify(value));
async function finished(): Promise<{ state: string; error?: string; result?: unknown; id: number }> {
  for (;;) {
    const work = JSON.parse((await send('GET', '/api/job')).body);
    if (work.state !== 'running') return work;
    await new Promise(resolve => setTimeout(resolve, 20));
  }
}

test('hostile requests are refused: Host, Origin, cross-site, type, size, fields, methods', async () => {
  const good = { kind: 'graph', text: 'w1 w2' };
  const status = async (reply: Promise<Reply>) => (await reply).status;
  const own = `http://127.0.0.1:${port}`;
  for (const Host of ['evil.example', `evil.example:${port}`, '127.0.0.1', `127.0.0.1.evil.example:${port}`])
    assert.equal(await status(send('GET', '/', { Host })), 403, Host);
  for (const Origin of ['http://evil.example', 'null', `https://127.0.0.1:${port}`, 'http://127.0.0.1:1', 'file://'])
    assert.equal(await status(post('/api/job', good, { Origin })), 403, Origin);
  for (const site of ['cross-site', 'same-site', 'none'])
    assert.equal(await status(post('/api/job', good, { 'Sec-Fetch-Site': site })), 403, site);
  assert.equal(await status(send('GET', '/api/job', { 'Sec-Fetch-Site': 'cross-site' })), 403);
  for (const type of ['text/plain', 'application/x-www-form-urlencoded', 'application/jsonp'])
    assert.equal(await status(send('POST', '/api/job', { 'Content-Type': type }, JSON.stringify(good))), 415, type);
  assert.equal(await status(send('POST', '/api/job', JSON_TYPE, '{')), 400);
  assert.equal(await status(send('POST', '/api/job', JSON_TYPE, `"${'x'.repeat(70_000)}"`)), 413);
  for (const body of [null, [], 'x', {}, { kind: 'eval', text: 'w1' }, { kind: 'graph' }, { kind: 'graph', text: 5 }])
    assert.equal(await status(post('/api/job', body)), 400, JSON.stringify(body));
  assert.equal(await status(post('/api/job', { ...good, text: 'w'.repeat(10_001) })), 400);
  assert.equal(await status(post('/api/job', { ...good, without: ['x'] })), 400);
  for (const address of ['/../package.json', '/components.safetensors', '/api', '//', '/%2e%2e/'])
    assert.equal(await status(send('GET', address)), 404, address);
  assert.equal(await status(send('DELETE', '/api/job')), 404);
  assert.equal(await status(post('/api/cancel', { id: 99 })), 409);
  // and none of them has begun anything
  assert.equal(JSON.parse((await send('GET', '/api/job')).body).state, 'none');
  const page = await send('GET', '/', { Origin: own, 'Sec-Fetch-Site': 'same-origin' });
  assert.equal(page.status, 200);
  assert.equal(page.headers['access-control-allow-origin'], undefined);
  assert.match(page.body, /connect-src 'self'/);
  assert.equal((server.address() as AddressInfo).address, '127.0.0.1');
});

test('what a job can’t do is said in its state, one job runs at a time and can be cancelled', async () => {
  for (const [body, message] of [
    [{ kind: 'graph', text: 'w1 '.repeat(13) }, /takes at most 12/],
    [{ kind: 'ask', text: 'w1', without: 'h.9.x:0' }, /takes module:index/],
    [{ kind: 'circuit', text: 'w1', token: 'nothing' }, /not one token/],
  ] as const) {
    assert.equal((await post('/api/job', body)).status, 202);
    const { state, error } = await finished();
    assert.equal(state, 'failed');
    assert.match(error!, message);
  }
  const { id } = JSON.parse((await post('/api/job', { kind: 'graph', text: 'w1 w2 w3 w4 w5 w6 w7 w8' })).body);
  assert.equal((await post('/api/job', { kind: 'graph', text: 'w1' })).status, 409);
  assert.equal((await post('/api/cancel', { id })).status, 200);
  assert.equal((await finished()).state, 'cancelled');
  assert.equal((await post('/api/job', { kind: 'graph', text: 'w1 w2' })).status, 202);
  assert.equal((await finished()).state, 'done');
});

const executablePath = [process.env.CHROMIUM_PATH ?? '']
  .concat(
    (process.env.PATH ?? '')
      .split(path.delimiter)
      .flatMap(dir => ['chromium', 'chromium-browser', 'google-chrome'].map(name => path.join(dir, name))),
  )
  .find(file => file && fs.existsSync(file));

test('a session: type a text, see its graph, switch a component off, see the prediction change, reload', {
  timeout: 180_000,
  ...(!executablePath && { skip: 'no Chromium: set CHROMIUM_PATH or put chromium on PATH' }),
}, async () => {
  const args = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--no-first-run'];
  const browser = await chromium.launch({ executablePath: executablePath!, args });
  try {
    const page = await browser.newPage();
    const errors: string[] = [];
    page.on('pageerror', error => errors.push(error.message));
    await page.goto(`http://127.0.0.1:${port}/#prompt`);
    const status = page.locator('#live-status');
    const done = (kind: string) => status.filter({ hasText: `${kind}: done` }).waitFor({ timeout: 60_000 });
    await page.fill('#live-text', `w1 w2 ${HOSTILE.split(' ')[0]} w4`);
    await page.click('[data-live=graph]');
    await done('graph');
    const card = page.locator('#live-results .graph-card');
    assert.match((await card.locator('h4').textContent()) ?? '', /^next token .* after w4, position 3/);
    // by keyboard alone: choose what feeds it, and then what that is fed by
    const fed = card.locator('ol[aria-label="Fed by"] button').first();
    const name = (await fed.textContent())!;
    await fed.focus();
    await page.keyboard.press('Enter');
    assert.equal(await card.locator('h4').textContent(), name);
    assert.equal(await page.evaluate('document.activeElement.textContent'), name);
    assert.ok((await card.locator('path').count()) > 0);
    // off goes the component that feeds it most: the last layer's
    const before = page.locator('#live-answer table').nth(0);
    const after = page.locator('#live-answer table').nth(1);
    await page.click('[data-live=ask]');
    await done('ask');
    assert.equal(await before.locator('tbody').textContent(), await after.locator('tbody').textContent());
    await page.fill('#live-without', 'h.1.mlp.down_proj:0, h.0.mlp.down_proj:1');
    await page.click('[data-live=ask]');
    const bodies = () => Promise.all([before, after].map(table => table.locator('tbody').textContent()));
    for (let [a, b] = await bodies(); a === b; [a, b] = await bodies())
      await new Promise(resolve => setTimeout(resolve, 50)); // the test's time limit ends it
    const shown = await after.locator('tbody').textContent();
    await page.reload();
    await page.locator('#live-answer').waitFor();
    assert.equal(await after.locator('tbody').textContent(), shown);
    assert.equal(await page.inputValue('#live-without'), 'h.1.mlp.down_proj:0, h.0.mlp.down_proj:1');
    // a tab that is closed in the middle of a job: it goes on, and the next tab finds it
    await page.fill('#live-text', 'w3 w4 w5 w6 w7');
    await page.click('[data-live=circuit]');
    await status.filter({ hasText: 'circuit' }).waitFor();
    await page.close();
    const next = await browser.newPage();
    await next.goto(`http://127.0.0.1:${port}/#prompt`);
    await next.locator('.circuit-card').waitFor({ timeout: 60_000 });
    assert.equal(await next.locator('.circuit-card tbody tr').count(), 5);
    assert.equal(await next.evaluate('window.hit'), undefined);
    assert.equal(await next.locator('img').count(), 0);
    assert.deepEqual(errors, []);
  } finally {
    await browser.close();
  }
});
