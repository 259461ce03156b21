/** Interpretation without any model: a judge that knows the toy's grammar, and an endpoint that does all that can go wrong. */
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, test } from 'node:test';
import { endpointFrom, makeBudget, withoutKey } from './chat.ts';
import {
  CHANCE,
  detectionTrials,
  drawsOf,
  fuzzingTrials,
  inParallel,
  interpret,
  intruderTrials,
  overlapBaseline,
  readLabel,
  readNumbers,
  type Subject,
  scoreTrial,
  type Trial,
} from './interpret.ts';
import { neighboursOf } from './interpret-graph.ts';
import type { Pool, Window } from './interpret-pool.ts';
import type { Run } from './run-files.ts';

const range = (n: number) => Array.from({ length: n }, (_, i) => i);
const sum = (numbers: Iterable<number>) => [...numbers].reduce((a, b) => a + b, 0);
const mean = (numbers: number[]) => sum(numbers) / numbers.length;
const read = (file: string) => JSON.parse(readFileSync(new URL(file, import.meta.url), 'utf8'));

// ---- The toy: a judge that knows the rules ----

const S = 32;
/** A decomposed toy on its held-out rows: what fires where, and what a judge who knows the grammar says. */
function readToy() {
  const { leaves, sets } = read('../tools/fixtures/cluster/toy.json') as { leaves: [string, number][]; sets: string[] };
  const rows: number[][] = read('../assets/toy/eval.json');
  const { rules, labels } = read('../assets/toy/labels.json') as { rules: { name: string }[]; labels: number[][][] };
  const fires = sets.map(text => {
    const bytes = Buffer.from(
      text.replace(/~(\d+)~/g, (_, n) => 'A'.repeat(Number(n))),
      'base64',
    );
    return range(rows.length * S).map(p => (bytes[p >> 3]! & (1 << (p & 7))) !== 0);
  });
  const numberOf = new Map(leaves.map(([module, index], leaf) => [`${module}:${index}`, leaf]));
  const pool: Pool = {
    rows,
    fires: (module, index, row, position) => fires[numberOf.get(`${module}:${index}`)!]![row * S + position]!,
  };
  const subjects = leaves.map(([module, index], leaf): Subject => {
    const set = fires[leaf]!;
    const random = drawsOf(`windows of ${leaf}`);
    const places = range(set.length).filter(p => set[p]);
    const chosen = range(12).map(() => places[Math.floor(random() * places.length)]!);
    const windows = [...new Set(chosen)].map((p): Window => {
      const [row, at] = [Math.floor(p / S), p % S];
      const start = Math.max(0, at - 10);
      const tokens = rows[row]!.slice(start, at + 11);
      return { row, start, tokens, fires: tokens.flatMap((_, i) => (set[row * S + start + i] ? [i] : [])) };
    });
    return { module, index, density: places.length / set.length, windows };
  });
  const inForce = (rule: number, row: number, position: number) => labels[row]![position]!.includes(rule);
  const known = rules.map((_, rule) => labels.flat().flatMap((ids, p) => (ids.includes(rule) ? [p] : [])));
  const answers = fires.map(set => {
    const firings = set.filter(f => f).length;
    const scores = known.map(at => (2 * at.filter(p => set[p]).length) / (at.length + firings)); // F1
    const best = scores.indexOf(Math.max(...scores));
    return { rule: best, f1: scores[best]! };
  });
  return { subjects, pool, answers, inForce, rules };
}

let known: ReturnType<typeof readToy> | undefined;
const toy = () => (known ??= readToy());

test('the grammar as judge: near 1 where a component is its rule, near chance with shuffled labels', t => {
  const { subjects, pool, answers, inForce } = toy();
  const exact = range(subjects.length).filter(c => answers[c]!.f1 === 1);
  assert.ok(exact.length >= 15, `${exact.length} components with an F1 of 1`);
  const judge = (rule: number, { kind, windows }: Trial) =>
    windows.flatMap(({ row, start, tokens, marked }, i) => {
      const places = kind === 'fuzzing' ? marked : tokens.map((_, k) => k);
      const right = places.map(k => inForce(rule, row, start + k));
      return (kind === 'fuzzing' ? right.every(r => r) : right.some(r => r)) ? [i + 1] : [];
    });
  t.diagnostic(`${exact.length} components with an F1 of 1`);
  const random = drawsOf('shuffled labels');
  // another rule's label: any but those that say the same
  const wrong = exact.map(c => {
    const others = exact.filter(d => answers[d]!.rule !== answers[c]!.rule);
    return answers[others[Math.floor(random() * others.length)]!]!.rule;
  });
  for (const kind of ['detection', 'fuzzing'] as const) {
    const scores = (ruleOf: (i: number) => number) =>
      exact.flatMap((c, i) => {
        const trials = kind === 'detection' ? detectionTrials(subjects[c]!, pool) : fuzzingTrials(subjects[c]!);
        return trials.map(trial => scoreTrial(trial, judge(ruleOf(i), trial)));
      });
    const right = scores(i => answers[exact[i]!]!.rule);
    const shuffled = scores(i => wrong[i]!);
    t.diagnostic(`${kind}: ${mean(right).toFixed(3)} on ${right.length} trials, shuffled ${mean(shuffled).toFixed(3)}`);
    assert.ok(right.length >= 4 * exact.length, 'most components have trials');
    assert.ok(mean(right) > 0.97, `${kind}: ${mean(right)}`);
    assert.ok(Math.abs(mean(shuffled) - CHANCE[kind]) < 0.1, `${kind}, shuffled labels: ${mean(shuffled)}`);
  }
});

test('the intruder by token overlap alone is better than chance on the toy, and at chance where windows are random', t => {
  const { subjects } = toy();
  const score = (list: Subject[]) =>
    mean(list.flatMap(subject => intruderTrials(subject, list).map(trial => overlapBaseline(trial))));
  const random = drawsOf('any windows');
  const all = subjects.flatMap(({ windows }) => windows);
  const anywhere = subjects.map(subject => ({
    ...subject,
    windows: subject.windows.map(() => all[Math.floor(random() * all.length)]!),
  }));
  const [own, control] = [score(subjects), score(anywhere)];
  t.diagnostic(`token overlap: ${own.toFixed(3)}, windows of any component ${control.toFixed(3)}, chance 0.2`);
  assert.ok(own > 0.5, `${own}`);
  assert.ok(Math.abs(control - 0.2) < 0.04, `${control}`);
});

test('trials: sizes, marks, the same at every start; scores by hand', () => {
  const { subjects, pool } = toy();
  const subject = subjects.find(({ windows }) => windows.length >= 8)!;
  const detection = detectionTrials(subject, pool);
  assert.deepEqual(detection, detectionTrials(subject, pool));
  assert.equal(detection.length, 5);
  for (const { windows, right } of detection) {
    assert.equal(windows.length, 10);
    assert.equal(right.length, 5);
    for (const [i, { row, start, tokens, marked }] of windows.entries()) {
      const fires = tokens.some((_, k) => pool.fires(subject.module, subject.index, row, start + k));
      assert.equal(fires, right.includes(i + 1));
      assert.deepEqual(marked, []);
    }
  }
  for (const { windows, right } of fuzzingTrials(subject)) {
    assert.deepEqual([windows.length, right.length], [7, 5]);
    for (const [i, { fires, marked }] of windows.entries()) {
      assert.equal(marked.length, fires.length);
      assert.equal(right.includes(i + 1), marked.every(k => fires.includes(k))); // biome-ignore format: a line
    }
  }
  const intruder = intruderTrials(subject, subjects);
  assert.equal(intruder.length, 10);
  for (const { windows, right } of intruder) assert.deepEqual([windows.length, right.length], [5, 1]);
  const trial = detection[0]!;
  const wrong = range(10).map(i => i + 1).filter(n => !trial.right.includes(n)); // biome-ignore format: a line
  assert.equal(scoreTrial(trial, trial.right), 1);
  assert.equal(scoreTrial(trial, wrong), 0);
  assert.equal(scoreTrial(trial, []), 0.5);
  assert.equal(scoreTrial(trial, [...trial.right, ...wrong]), 0.5);
  assert.equal(scoreTrial(trial, trial.right.slice(0, 4)), 0.9);
  assert.equal(scoreTrial(intruder[0]!, intruder[0]!.right), 1);
  assert.equal(scoreTrial(intruder[0]!, [(intruder[0]!.right[0]! % 5) + 1]), 0);
  assert.equal(intruderTrials({ ...subject, density: 0.9 }, subjects).length, 0, 'nothing is as dense');
});

test('answers are read leniently, and nonsense is known as such', () => {
  assert.deepEqual(readLabel('{"label":"a","confidence":0.5,"reason":"b"}'), {
    label: 'a',
    confidence: 0.5,
    reason: 'b',
  });
  const long = readLabel(
    'Sure! {this} is it:\n```json\n{"label": "one two\\nthree four five six seven eight nine"}\n```',
  )!;
  assert.deepEqual(long, { label: 'one two three four five six seven eight', confidence: null, reason: '' });
  assert.equal(readLabel('{"label": 3}'), undefined);
  assert.equal(readLabel('I do not know'), undefined);
  assert.equal(readLabel('{"label":"a\u202eb"}')?.label, 'a b');
  const detection = { kind: 'detection', windows: range(3), right: [] } as unknown as Trial;
  assert.deepEqual(readNumbers('{"windows":[1,3,3]}', detection), [1, 3]);
  assert.deepEqual(readNumbers('{"windows":[]}', detection), []);
  for (const bad of ['{"windows":[4]}', '{"windows":[0]}', '{"windows":"1"}', '{"windows":[1.5]}', '[1]', ''])
    assert.equal(readNumbers(bad, detection), undefined, bad);
  const intruder = { ...detection, kind: 'intruder' } as Trial;
  assert.deepEqual(readNumbers('{"window": 2}', intruder), [2]);
  assert.equal(readNumbers('{"window": [1, 2]}', intruder), undefined);
});

// ---- A run's folder, and an endpoint on this machine ----

const folders: string[] = [];
after(() => folders.map(dir => rmSync(dir, { recursive: true })));
const COMPONENTS = 6;
/** A made-up run: component c fires on token c, and rows are these tokens in some order, with others between. */
function makeRun(): { dir: string; job: Run } {
  const dir = mkdtempSync(join(tmpdir(), 'interpret-'));
  folders.push(dir);
  const random = drawsOf('made-up rows');
  const rows = range(40).map(() => range(24).map(() => Math.floor(random() * 12)));
  const firesIn = (c: number) => rows.flatMap((row, r) => row.flatMap((token, at) => (token === c ? [{ r, at }] : [])));
  const components = range(COMPONENTS).map(c => ({
    ...{ module: c < 3 ? 'h.0.a' : 'h.0.b', index: c % 3, column: c, firings: firesIn(c).length - c },
    ...{ density: 0.08, meanCi: 0.08, meanActivation: 1, lowCount: false },
    input: { top: [[c, firesIn(c).length, 2.5]], bottom: [], missed: 0 },
    output: { top: [[c + 6, 3.5, 1.5]], bottom: [] },
    partners: { jaccard: [], pmi: [] },
    examples: {
      top: [],
      random: firesIn(c)
        .slice(0, 12)
        .map(({ r, at }) => {
          const start = Math.max(0, at - 4);
          const tokens = rows[r]!.slice(start, at + 5);
          const ci = tokens.map(token => (token === c ? 0.75 : 0));
          return { row: r, start, at: at - start, tokens, ci, activation: ci };
        }),
    },
  }));
  const vocabulary = Object.fromEntries(range(12).map(t => [t, ` t${t}`]));
  const harvest = {
    ...{ formatVersion: 1, positions: 960, pairPositions: 960, outputTokens: 12, settings: { threshold: 0 } },
    modules: ['h.0.a', 'h.0.b'].map((path, i) => ({ path, offset: 3 * i, C: 3, alive: 3, meanCi: [] })),
    ...{ components, passages: [], vocabulary },
  };
  writeFileSync(join(dir, 'harvest.json'), JSON.stringify(harvest));
  writeFileSync(join(dir, 'components.safetensors'), 'made up');
  return { dir, job: fakeJob(dir, rows) };
}
/** Enough of a run for the windows file to be there already. */
function fakeJob(dir: string, rows: number[][]): Run {
  const fires = Object.fromEntries(
    range(COMPONENTS).map(c => {
      const bytes = Buffer.alloc(Math.ceil((rows.length * 24) / 8));
      for (const [p, token] of rows.flat().entries()) if (token === c) bytes[p >> 3]! |= 1 << (p & 7);
      return [`h.0.${c < 3 ? 'a' : 'b'}:${c % 3}`, bytes.toString('base64')];
    }),
  );
  const hash = (file: string) =>
    createHash('sha256')
      .update(readFileSync(join(dir, file)))
      .digest('hex');
  const hashes = { components: hash('components.safetensors'), harvest: hash('harvest.json') };
  const texts = Object.fromEntries(range(12).map(t => [t, ` t${t}`]));
  const firings = Object.fromEntries(Object.keys(fires).map(name => [name, []]));
  writeFileSync(
    join(dir, 'interpretations.windows.json'),
    JSON.stringify({ formatVersion: 2, ...hashes, rows, texts, fires, firings }),
  );
  return { problem: { config: { out: dir } } } as unknown as Run;
}

/** The right answer to any question: labels name the token, and trials are judged by it. */
function answerTo(prompt: string): string {
  const texts = [...prompt.matchAll(/^\d+\. (.*)$/gm)].map(([, text]) => text!);
  const marks = texts.map(text => [...text.matchAll(/<<\s*(t\d+)>>/g)].map(([, token]) => token!));
  const [, about] = /described as: "(t\d+)"/.exec(prompt) ?? [];
  const numbers = (wanted: (i: number) => boolean) => texts.flatMap((_, i) => (wanted(i) ? [i + 1] : []));
  if (prompt.includes('which of these texts')) {
    return JSON.stringify({ windows: numbers(i => texts[i]!.split(' ').includes(about!)) });
  }
  if (prompt.includes('marks right'))
    return JSON.stringify({ windows: numbers(i => marks[i]!.every(t => t === about)) });
  if (prompt.includes('Which one?')) {
    const common = marks.flat().sort((a, b) => marks.flat().filter(t => t === b).length - marks.flat().filter(t => t === a).length)[0]; // biome-ignore format: a line
    return JSON.stringify({ window: numbers(i => marks[i]![0] !== common)[0] });
  }
  const [, token] = /<<\s*(t\d+)>>/.exec(prompt)!;
  return JSON.stringify({ label: token, confidence: 0.9, reason: 'it fires there' });
}

type Fault = 'none' | '429' | '500' | 'cut' | 'slow' | 'html' | 'empty' | 'nonsense';
/** `fault` by the number of the request. Counts what it was paid for: whole answers. */
async function startServer(fault: (request: number) => Fault, answer = answerTo) {
  const paid = new Map<string, number>();
  const state = { requests: 0, tokens: 0, keys: new Set<string | undefined>() };
  const serve = (request: IncomingMessage, response: ServerResponse, body: string) => {
    const prompt: string = JSON.parse(body).messages.at(-1).content;
    const kind = fault(state.requests++);
    const key = request.headers.authorization;
    state.keys.add(key);
    const usage = { prompt_tokens: Math.ceil(body.length / 4), completion_tokens: 20 };
    const whole = (content: string) => {
      paid.set(prompt, (paid.get(prompt) ?? 0) + 1);
      state.tokens += usage.prompt_tokens + usage.completion_tokens;
      response.writeHead(200, { 'content-type': 'application/json' });
      response.end(JSON.stringify({ choices: [{ message: { role: 'assistant', content } }], usage }));
    };
    if (kind === '429') response.writeHead(429, { 'retry-after': '0.01' }).end(`too many from ${key}`);
    else if (kind === '500') response.writeHead(500).end(`sorry ${key}`);
    else if (kind === 'cut') {
      response.writeHead(200, { 'content-length': '5000' });
      response.write('{"choices":[{"message":{"content":"{\\"label\\":');
      setTimeout(() => response.destroy(), 5);
    } else if (kind === 'html') response.writeHead(200).end(`<html>${key}</html>`);
    else if (kind === 'empty') response.writeHead(200).end('{"choices":[]}');
    else if (kind === 'nonsense') whole(`As for ${key}, who knows?`);
    else if (kind === 'slow') setTimeout(() => whole(answer(prompt)), 60);
    else whole(answer(prompt));
  };
  const server = createServer((request, response) => {
    const chunks: Buffer[] = [];
    request.on('data', chunk => chunks.push(chunk));
    request.on('end', () => serve(request, response, Buffer.concat(chunks).toString()));
  });
  await new Promise<void>(resolve => server.listen(0, '127.0.0.1', resolve));
  const stop = () => {
    server.closeAllConnections();
    return new Promise(resolve => server.close(resolve));
  };
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/v1`;
  return { url, paid, state, stop };
}

const KEY = 'nk-7f3a9c51e2d84b60';
/** Runs the stage with the key in the environment; what it printed stands in `said`. */
async function run(job: Run, flags: Record<string, string | boolean>) {
  const said: string[] = [];
  const [out, err] = [process.stdout.write, process.stderr.write];
  const listen = (chunk: unknown) => {
    said.push(String(chunk));
    return true;
  };
  const log = console.log;
  process.env.NANO_API_KEY = KEY;
  process.stderr.write = listen as typeof err;
  console.log = (...words) => void said.push(words.join(' '));
  try {
    const code = await interpret(job, { 'api-model': 'made-up-1', 'retry-wait': '0.001', ...flags });
    return { code, said: said.join('\n') };
  } finally {
    process.stdout.write = out;
    process.stderr.write = err;
    console.log = log;
    delete process.env.NANO_API_KEY;
  }
}
const results = (dir: string) =>
  readFileSync(join(dir, 'interpretations.jsonl'), 'utf8')
    .trimEnd()
    .split('\n')
    .map(text => JSON.parse(text));
const hasNoKey = (dir: string, said: string) => {
  for (const text of [said, ...readdirSync(dir).map(file => readFileSync(join(dir, file), 'utf8'))])
    for (const part of [KEY, KEY.slice(0, 10), KEY.slice(-10), Buffer.from(KEY).toString('base64').slice(0, 12)])
      assert.ok(!text.includes(part), `the key stands in ${text.slice(0, 200)}`);
};

test('an honest endpoint: every component gets a label and three scores, each question paid once', async () => {
  const { dir, job } = makeRun();
  const server = await startServer(() => 'none');
  const { code, said } = await run(job, { 'api-url': server.url });
  await server.stop();
  assert.equal(code, 0, said);
  const [header, ...lines] = results(dir);
  assert.equal(header.formatVersion, 1);
  assert.equal(lines.length, 4 * COMPONENTS);
  for (const { kind, result, model, tokens } of lines) {
    assert.equal(model, 'made-up-1');
    assert.ok(tokens > 0);
    if (kind === 'label') assert.match(result.label, /^t\d+$/);
    else assert.deepEqual([result.score, result.unreadable, result.chance], [1, 0, CHANCE[kind as 'intruder']], kind);
  }
  assert.equal(server.paid.size, COMPONENTS * (1 + 5 + 5 + 10));
  assert.ok([...server.paid.values()].every(n => n === 1));
  assert.deepEqual([...server.state.keys], [`Bearer ${KEY}`]);
  hasNoKey(dir, said);
  const again = await startServer(() => 'none');
  assert.equal((await run(job, { 'api-url': again.url })).code, 0);
  await again.stop();
  assert.equal(again.state.requests, 0, 'a second start asks nothing');
});

test('an endpoint that delays, fails, cuts, talks nonsense and dies: complete and right after a second start', async () => {
  const { dir, job } = makeRun();
  // biome-ignore format: a line
  const faults: Fault[] = ['none', '429', 'none', '500', 'slow', 'cut', 'none', 'html', 'none', 'empty', 'none', 'slow', 'none'];
  const first = await startServer(n => faults[n % faults.length]!);
  const dying = setInterval(() => {
    if (first.paid.size > 50) void first.stop();
  }, 1);
  const died = await run(job, { 'api-url': first.url, concurrency: '5', tries: '9' });
  clearInterval(dying);
  await first.stop();
  assert.equal(died.code, 1);
  assert.match(died.said, /stopped: http:\/\/127\.0\.0\.1:\d+\/v1\/chat\/completions: \w+/);
  assert.ok(first.paid.size > 50 && first.paid.size < COMPONENTS * 21);
  // killed in the middle of a line
  const answers = join(dir, 'interpretations.answers.jsonl');
  writeFileSync(answers, `${readFileSync(answers, 'utf8')}{"id":"h.0.a:0/la`);
  const second = await startServer(n => faults[(3 * n) % faults.length]!);
  const { code, said } = await run(job, { 'api-url': second.url, tries: '9' });
  await second.stop();
  assert.equal(code, 0, said);
  const honest = makeRun();
  const server = await startServer(() => 'none');
  await run(honest.job, { 'api-url': server.url });
  await server.stop();
  assert.deepEqual(results(dir), results(honest.dir));
  const both = [first, second].flatMap(({ paid }) => [...paid]);
  const lost = both.length - new Set(both.map(([prompt]) => prompt)).size;
  assert.ok(both.every(([, n]) => n === 1));
  assert.ok(lost <= 5, `${lost} answers were under way when it died: at most one for each of 5`);
  hasNoKey(dir, died.said + said);
});

test('nonsense is paid once, counts as unreadable and is asked again only on request', async () => {
  const { dir, job } = makeRun();
  const server = await startServer(n => (n % 4 === 3 ? 'nonsense' : 'none'));
  const { said } = await run(job, { 'api-url': server.url, concurrency: '1' });
  hasNoKey(dir, said);
  const before = server.state.requests;
  await run(job, { 'api-url': server.url });
  assert.equal(server.state.requests, before);
  const lines = results(dir).slice(1);
  const unread = sum(lines.map(({ result }) => (result.label === null ? 1 : (result.unreadable ?? 0))));
  assert.equal(unread, Math.floor(before / 4));
  assert.ok(lines.every(({ result }) => result.score === undefined || result.score === 1));
  await server.stop();
  const better = await startServer(() => 'none');
  assert.equal((await run(job, { 'api-url': better.url, 'ask-again': true })).code, 0);
  await better.stop();
  assert.ok(results(dir).slice(1).every(({ result }) => result.label || result.score === 1)); // biome-ignore format: a line
  assert.equal(results(dir).length, 1 + 4 * COMPONENTS);
});

test('the budget stops before it is passed, and a further start goes on', async () => {
  const { dir, job } = makeRun();
  const server = await startServer(() => 'none');
  const limit = 20_000;
  const { code, said } = await run(job, { 'api-url': server.url, 'max-tokens': String(limit), 'answer-tokens': '50' });
  assert.equal(code, 1);
  assert.match(said, /budget of --max-tokens is used up/);
  assert.ok(server.state.tokens <= limit && server.state.tokens > 0.6 * limit, `${server.state.tokens} of ${limit}`);
  assert.match(said, new RegExp(`${server.state.requests} answers paid`));
  assert.equal((await run(job, { 'api-url': server.url, 'answer-tokens': '50' })).code, 0);
  await server.stop();
  assert.equal(results(dir).length, 1 + 4 * COMPONENTS);
  assert.ok([...server.paid.values()].every(n => n === 1));
});

test('on paper: prompts out, answers in, the same results', async () => {
  const { dir, job } = makeRun();
  const file = join(dir, 'by-hand.jsonl');
  for (const round of [1, 2]) {
    const { code, said } = await run(job, { 'prompts-only': true, ...paper });
    assert.equal(code, 0, said);
    const prompts = readFileSync(join(dir, 'interpretations.prompts.jsonl'), 'utf8').trimEnd().split('\n');
    const lines = prompts.map(text => {
      const { id, messages } = JSON.parse(text);
      return `${JSON.stringify({ id, content: answerTo(messages.at(-1).content), model: 'made-up-1' })}\n`;
    });
    assert.equal(lines.length, round === 1 ? COMPONENTS * 11 : COMPONENTS * 10);
    writeFileSync(file, lines.join(''));
    assert.equal((await run(job, { answers: file, ...paper })).code, 0);
  }
  const lines = results(dir).slice(1);
  assert.equal(lines.length, 4 * COMPONENTS);
  assert.ok(lines.every(({ kind, result }) => (kind === 'label' ? /^t\d+$/.test(result.label) : result.score === 1)));
});

test('what is refused, and what a refused key says', async () => {
  const { dir, job } = makeRun();
  const refused = async (flags: Record<string, string | boolean>, message: RegExp) =>
    assert.rejects(run(job, flags), (error: Error) => {
      assert.equal(error.name, 'UsageError');
      assert.match(error.message, message);
      assert.ok(!error.message.includes(KEY));
      return true;
    });
  await refused({ 'api-url': 'nowhere' }, /--api-url: takes an address/);
  await refused({ 'api-url': 'ftp://host/v1' }, /http or https/);
  await refused({ 'api-url': `https://me:${KEY}@host/v1` }, /comes from NANO_API_KEY/);
  await refused({ 'api-url': 'http://far.example/v1' }, /http would send the key readable/);
  await refused({ 'max-tokens': '-3', 'api-url': 'https://host/v1' }, /--max-tokens: got -3/);
  writeFileSync(join(dir, 'bad.jsonl'), '{"id":"x","content":"y"}\n[]\n');
  await refused({ answers: join(dir, 'bad.jsonl'), ...paper }, /line 2 is no JSON object/);
  rmSync(join(dir, 'harvest.json'));
  await refused({ 'api-url': 'https://host/v1' }, /has no harvest\.json; harvest --run/);
  const forbidden = createServer((request, response) => {
    request.resume();
    response.writeHead(401).end(`bad key ${KEY.slice(0, 12)}***`);
  });
  await new Promise<void>(resolve => forbidden.listen(0, '127.0.0.1', resolve));
  const other = makeRun();
  const url = `http://127.0.0.1:${(forbidden.address() as AddressInfo).port}`;
  const { code, said } = await run(other.job, { 'api-url': url });
  forbidden.closeAllConnections();
  forbidden.close();
  assert.equal(code, 1);
  assert.match(said, /status 401;/);
  hasNoKey(other.dir, said);
});
test('graph labels: late to early, early to late, and each question names the neighbours with their labels', async () => {
  const { dir, job } = makeRun();
  const [a, b] = ['h.0.a', 'h.0.b'];
  const edge = (index: number, A: number) => ({ module: a, index, A, Aabs: Math.abs(A), normalised: A });
  const targets = range(3).map(index => ({
    ...{ module: b, index, share: 1 },
    sources: [edge(index, -3), edge((index + 1) % 3, 1), { token: 7, A: 2, Aabs: 2, normalised: 2 }],
  }));
  const prompts: string[] = [];
  const server = await startServer(
    () => 'none',
    prompt => {
      prompts.push(prompt);
      const name = /matrix (\S+)\. It fires/.exec(prompt)?.[1];
      if (prompt.includes('What does it do, where it fires?')) return `{"label":"does ${name}"}`;
      if (prompt.includes('When does it fire?\n')) return `{"label":"when ${name}"}`;
      return prompt.includes('One label for both') ? '{"label":"both"}' : answerTo(prompt);
    },
  );
  await assert.rejects(run(job, { 'api-url': server.url, graph: true }), /no attributions\.json; attributions --run/);
  writeFileSync(join(dir, 'attributions.json'), JSON.stringify({ formatVersion: 1, components: 'other', targets }));
  await assert.rejects(run(job, { 'api-url': server.url, graph: true }), /belongs to other components/);
  writeFileSync(join(dir, 'attributions.json'), JSON.stringify({ formatVersion: 1, targets }));
  const { code, said } = await run(job, { 'api-url': server.url, graph: true });
  assert.equal(code, 0, said);
  const lines = results(dir).slice(1);
  assert.equal(lines.filter(({ kind }) => kind === 'graph-label').length, COMPONENTS);
  const about = (kind: string, module: string) =>
    prompts.filter(p => p.includes(kind) && p.includes(`matrix ${module}.`));
  assert.equal(about('What does it do, where', a).length, 3);
  for (const prompt of about('What does it do, where', a)) {
    assert.match(prompt, /h\.0\.b:\d, does h\.0\.b \(suppresses, 75 % of these\)/); // 3 of 4, the later pass's own label
    assert.match(prompt, /h\.0\.b:\d, does h\.0\.b \(supports, 25 % of these\)/);
  }
  for (const prompt of about('When does it fire?\n', b)) {
    assert.match(prompt, /h\.0\.a:\d, when h\.0\.a \(suppresses, 50 % of these\)/);
    assert.match(prompt, /the token " t7" \(supports, 33 % of these\)/);
  }
  for (const prompt of about('One label for both', b)) assert.match(prompt, /"when h\.0\.b".*\n.*"does h\.0\.b"/);
  const asked = server.state.requests;
  assert.equal((await run(job, { 'api-url': server.url, graph: true })).code, 0);
  assert.equal(server.state.requests, asked, 'a second start asks nothing');
  await server.stop();
});

test('modules are put in an order in which what feeds comes first', () => {
  const target = (module: string, ...from: string[]) => ({
    ...{ module, index: 0 },
    sources: from.map(name => ({ module: name, index: 0, A: 1, Aabs: 1 })),
  });
  const { order } = neighboursOf({ targets: [target('a', 'c'), target('c', 'd', 'b'), target('b', 'd')] });
  assert.deepEqual(order, ['d', 'b', 'c', 'a']);
  const many = range(12).map(index => ({ module: 'x', index, A: 1, Aabs: index }));
  const { upstream } = neighboursOf({ targets: [{ module: 'y', index: 0, sources: many }] });
  assert.deepEqual(upstream('y:0').map(({ name }) => name), range(8).map(i => `x:${11 - i}`)); // biome-ignore format: a line
});

/** --api-model alone is refused. */
const paper = { 'api-model': undefined as unknown as string };

test('parts: the key is cut out of texts, the budget waits for what is under way', async () => {
  assert.equal(withoutKey('all is well', KEY), 'all is well');
  assert.equal(withoutKey(`see ${KEY.slice(3, 12)}`, KEY), '(left out: repeats a part of the key)');
  assert.equal(withoutKey('abc', undefined), 'abc');
  assert.equal(withoutKey('an x-ray', 'x'), 'an x-ray'); // what local servers are given in place of a key
  const budget = makeBudget(100);
  assert.ok(await budget.reserve(60));
  const second = budget.reserve(60);
  budget.settle(60, 30);
  assert.ok(await second, 'room after the first was cheaper than it could have been');
  budget.settle(60, 60);
  assert.equal(await budget.reserve(11), false);
  assert.equal(budget.spent(), 90);
  let [active, most] = [0, 0];
  const order = await inParallel(range(20), 3, async n => {
    most = Math.max(most, ++active);
    await new Promise(resolve => setTimeout(resolve, (n * 7) % 5));
    active--;
    return n;
  });
  assert.deepEqual(order, range(20));
  assert.equal(most, 3);
  assert.equal(
    endpointFrom({ 'api-url': 'https://h/v1/', 'api-model': 'm' }, 'k')!.url.href,
    'https://h/v1/chat/completions',
  );
});
