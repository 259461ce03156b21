/** The page in a real browser: opens from disk, every view by mouse and by keyboard, and no token text becomes HTML. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { type Browser, chromium, type Locator, type Page } from 'playwright-core';
import { type Example, type Harvest, type HarvestComponent, harvestDefaults } from './harvest.ts';
import { type ReportData, renderReport } from './page.ts';
import { readMeanings, writePage } from './page-meanings.ts';
import type { PackedGraph } from './parts.ts';
import { componentsHash } from './run-files.ts';

const template = fs.readFileSync(fileURLToPath(new URL('page.html', import.meta.url)), 'utf8');
const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'page-'));

function findChromium(): string | undefined {
  const folders = (process.env.PATH ?? '').split(path.delimiter);
  const names = ['chromium', 'chromium-browser', 'google-chrome'];
  const candidates = names.flatMap(name => folders.map(folder => path.join(folder, name)));
  return [process.env.CHROMIUM_PATH ?? '', ...candidates].find(file => file && fs.existsSync(file));
}
const executablePath = findChromium();
const options = executablePath
  ? { timeout: 120_000 }
  : { skip: 'no Chromium: set CHROMIUM_PATH or put chromium, chromium-browser or google-chrome on PATH' };

let browser: Browser;
before(async () => {
  const args = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--no-first-run'];
  if (executablePath) browser = await chromium.launch({ executablePath, args });
});
after(async () => {
  await browser?.close();
  fs.rmSync(folder, { recursive: true });
});

// ---- Pages of made-up runs ------------------------------------------------------------------------------------------

const HOSTILE = [
  '</script><script>window.hit=1</script>',
  '<img src=x onerror="window.hit=1">',
  '<!--<script>',
  '-->',
  ']]>',
  `"'\`\\`,
  '&lt;b&gt;&#60;i&#62;',
  'javascript:window.hit=1',
  '@@report-data@@',
  '$& $1 $`',
  '\0\x01\b\x1b[31m\x7f\x9f',
  '\r\n\t\u2028\u2029',
  '\ud800', // half of a pair
  '\udc00x',
  '\u202edlrow\u202c \u200f\u061c\u2066', // turns the reading direction
  '\ufeff\u200b',
  '',
  ' the',
  '🦁',
  '{{7*7}}__proto__',
];

function example(row: number, at: number, tokens: number[]): Example {
  const ci = tokens.map((_, k) => (k === at ? 1 : (k % 4) / 10));
  return { row, start: 0, at, tokens, ci, activation: tokens.map((_, k) => (k % 2 ? -1 : 1) * k) };
}

/** A run of `layers` x 2 modules with C components each, of which the last is dead. */
function makeRun(layers: number, C: number, texts: string[]): ReportData {
  const paths = Array.from({ length: layers }, (_, l) => [`h.${l}.attn.q_proj`, `h.${l}.mlp.c_fc`]).flat();
  const some = (n: number, length = 5) => Array.from({ length }, (_, k) => (n + 3 * k) % texts.length);
  const components = paths.flatMap((module, m) =>
    Array.from({ length: C - 1 }, (_, index): HarvestComponent => {
      const column = m * C + index;
      const density = (1 + (column % 97)) / 100;
      const list = some(column).map((t, k): [number, number, number] => [t, 200 - k, 2 - k / 4]);
      const partner = ((column + 1) % C === C - 1 ? m * C : column + 1) % (paths.length * C);
      return {
        ...{ module, index, column, firings: Math.round(1000 * density), density, meanCi: density / 2 },
        ...{ meanActivation: -0.5, lowCount: density < 0.1 },
        examples: { top: [example(3, 2, some(column, 9))], random: [example(4, 0, some(column + 1, 9))] },
        input: { top: list, bottom: [[some(column)[1]!, 0, null]], missed: index % 2 },
        output: { top: list, bottom: [] },
        partners: { jaccard: [[partner, 40, 0.5, 1.2]], pmi: [[partner, 40, 0.5, 1.2]] },
      };
    }),
  );
  const tokens = texts.map((_, t) => t);
  const firing = tokens.map(t =>
    paths.map((_, m): [number, number, number] => [m * C + (t % (C - 1)), 1 - m / (2 * paths.length), -1.5]),
  );
  const result: Harvest = {
    ...{ formatVersion: 1, positions: 1000, pairPositions: 1000, outputTokens: texts.length },
    settings: harvestDefaults,
    modules: paths.map((path, m) => {
      const meanCi = components.filter(c => c.module === path).map(c => c.meanCi);
      return { path, offset: m * C, C, alive: C - 1, meanCi: [...meanCi, 0] };
    }),
    components,
    passages: [0, 1].map(p => ({
      tokens: p ? tokens.toReversed() : tokens,
      positions: tokens.map((t, n) => ({
        ...{ fired: paths.length, firing: firing[n]! },
        predictions: [[t, 0.75] as [number, number]],
      })),
    })),
    vocabulary: Object.fromEntries(texts.map((text, t) => [t, text])),
  };
  const rule = { name: 'a rule', description: texts[0]!, component: { module: paths[0]!, index: 1 } };
  return {
    config: { config: { nSteps: 20 }, model: { path: texts[0] }, command: ['--model', texts[1], "it's"] },
    metrics: {
      'eval/ce_kl/ce_target': 1.25,
      'eval/ce_kl/kl_ci_masked': 0.0123,
      'eval/ce_kl/ce_difference_ci_masked': 0.5,
      'eval/ce_kl/ce_unrecovered_ci_masked': 0.25,
      'eval/loss/PGDReconLoss': 0.0456,
      'eval/l0/0.0_total': 7.89,
      ...Object.fromEntries(paths.map(path => [`eval/l0/0.0_${path}`, 1.5])),
    },
    history: [
      { step: 10, 'loss/total': 2, 'train/l0': 9 },
      { step: 20, 'loss/total': 1, 'train/l0': 0 },
      { step: 20, 'eval/ce_kl/ce_target': 1.25 },
    ],
    scoreboard: {
      rules: [
        { ...rule, precision: 0.75, recall: 1, f1: 0.857, causal: true, support: 12, klInForce: 1, klElsewhere: 0 },
      ],
      ...{ meanF1: 0.857, nF1AtLeast80: 1, nCausal: 1 },
    },
    harvest: result,
  };
}

function write(name: string, run: ReportData): string {
  const file = path.join(folder, name);
  fs.writeFileSync(file, renderReport(run, template));
  return pathToFileURL(file).href;
}

/** Opens a page, lets the test use it, and fails on any message, error or request that is not the page itself. */
async function using(url: string, use: (page: Page) => Promise<void>, viewport = { width: 1280, height: 800 }) {
  const context = await browser.newContext({ viewport });
  const page = await context.newPage();
  page.setDefaultTimeout(20_000); // a busy machine is not a broken page
  const complaints: string[] = [];
  page.on('console', message => complaints.push(`console: ${message.text()}`));
  page.on('pageerror', error => complaints.push(`error: ${error.message}`));
  page.on('request', request => {
    if (request.url().split('#')[0] !== url.split('#')[0]) complaints.push(`request: ${request.url()}`);
  });
  try {
    await page.goto(url);
    await use(page);
  } finally {
    await context.close();
  }
  assert.deepEqual(complaints, []);
}

const hash = (page: Page) => decodeURIComponent(new URL(page.url()).hash);
const sees = (page: Page, selector: string, text: string | RegExp) =>
  page.locator(selector).filter({ hasText: text }).first().waitFor();
const shown = (page: Page) => page.locator('main > section:visible').getAttribute('id');
/** Points at something until its tip shows: a scroll that comes late hides it again. */
async function showsTip(page: Page, target: Locator, text: string | RegExp) {
  const tip = page.locator('#tip:visible').filter({ hasText: text });
  for (let attempt = 0; attempt < 20; attempt++) {
    await page.mouse.move(0, 0);
    await target.hover();
    if (await tip.isVisible()) return;
  }
  assert.fail(`no tip ${text}`);
}
const fitsTheWidth = async (page: Page) =>
  assert.ok(await page.evaluate('document.documentElement.scrollWidth <= innerWidth'), 'nothing sticks out');

const ordinary = ['the', ' lion', ' says', ' "', 'roar', '"', '.', ' he', ' she', ' sleeps'];

// ---- Tests ----------------------------------------------------------------------------------------------------------

test('the template has the placeholder once, allows nothing but itself, and never writes HTML', () => {
  assert.equal(template.split('"@@report-data@@"').length, 2);
  assert.match(template, /default-src 'none'/);
  assert.doesNotMatch(template, /innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function/);
  assert.doesNotMatch(template, /https?:(?!\/\/www\.w3\.org\/2000\/svg)/);
});

test('every view works by clicking', options, async () => {
  await using(write('clicks.html', makeRun(2, 6, ordinary)), async page => {
    for (const text of ['1.25', '0.0456', '7.89', '20 of 24', "'it'\\''s'"]) await sees(page, '#overview', text);
    await sees(page, '#overview table', 'exactly CI');
    const curves = page.getByRole('img', { name: /^loss\/total from 2 at step 10 to 1 at step 20/ });
    await showsTip(page, curves, /step \d+: /);
    await page.getByRole('button', { name: 'linear', exact: true }).click();
    assert.equal(await page.locator('button[aria-pressed=true]').innerText(), 'linear');
    await page.getByRole('img', { name: /^sorted mean CI .* h\.1\.mlp\.c_fc/ }).click({ position: { x: 2, y: 9 } });
    await sees(page, '#detail h2', 'h.1.mlp.c_fc:4');
    await page.getByRole('link', { name: 'Overview' }).click();
    await page.getByRole('row', { name: 'a rule' }).getByRole('link').click();
    await sees(page, '#detail h2', 'h.0.attn.q_proj:1');
    await sees(page, '#detail', 'a rule');

    await page.locator('#search').fill('LION');
    const count = Number.parseInt(await page.locator('#count').innerText(), 10);
    assert.ok(count > 0 && count < 20, `${count} of 20 components have a lion`);
    await page.locator('#search').fill('no such token');
    assert.equal(await page.locator('#count').innerText(), '0 components');
    await page.locator('#search').fill('');
    await page.locator('#module').selectOption('h.0.mlp.c_fc');
    assert.equal(await page.locator('#count').innerText(), '5 components');
    await page.locator('#sort').selectOption('density');
    assert.match(await page.locator('#rows a').first().innerText(), /h\.0\.mlp\.c_fc:4/);
    await page.getByRole('button', { name: 'Turn the order round' }).click();
    assert.match(await page.locator('#rows a').first().innerText(), /h\.0\.mlp\.c_fc:0/);
    await page.locator('#module').selectOption('');
    await page.getByRole('button', { name: 'Turn the order round' }).click();
    await page.locator('#sort').selectOption('F1');
    assert.match(await page.locator('#rows a').first().innerText(), /h\.0\.attn\.q_proj:1/);

    await page.locator('#rows a').first().click();
    assert.equal(hash(page), '#h.0.attn.q_proj:1');
    const token = page.locator('.example .at').first();
    await showsTip(page, token, 'CI 1, activation 2');
    await page.getByRole('button', { name: 'activation', exact: true }).click();
    await page
      .getByRole('row', { name: /h\.0\.attn\.q_proj:2/ })
      .first()
      .getByRole('link')
      .click();
    await sees(page, '#detail h2', 'h.0.attn.q_proj:2');
    await page.goBack();
    await sees(page, '#detail h2', 'h.0.attn.q_proj:1');
    await page.getByRole('link', { name: 'passage 1: 2 tokens' }).click();
    assert.equal(hash(page), '#prompt/1/1/h.0.attn.q_proj:1');

    await sees(page, '#selected', 'fires on 2 of 10 tokens');
    await page.getByRole('button', { name: 'Passage 2' }).click();
    await page.locator('#tokens button').nth(2).click();
    assert.equal(hash(page), '#prompt/2/2/h.0.attn.q_proj:1');
    assert.deepEqual(await page.locator('.layer .mono').allInnerTexts(), [
      'h.0.attn.q_proj',
      'h.0.mlp.c_fc',
      'h.1.attn.q_proj',
      'h.1.mlp.c_fc',
    ]);
    await page.locator('#needed [data-column]').nth(1).click();
    await page.locator('#selected').getByRole('link', { name: 'h.0.mlp.c_fc:2' }).click();
    await sees(page, '#detail h2', 'h.0.mlp.c_fc:2');
  });
});

test('the ladder and the importances of a run with measures; neither where it has none', options, async () => {
  const run = makeRun(2, 6, ordinary);
  const paths = run.harvest.modules.map(m => m.path);
  const perModule = (name: string, value: number) => paths.map(p => [`eval/${name}${p}`, value] as const);
  const bins = ['0', '0-0.01', '0.01-0.1', '0.1-0.5', '0.5-0.9', '0.9-1', '1'];
  const measures: Record<string, number> = {
    ...{
      'eval/pgd/0': 0.5,
      'eval/pgd/20': 2.25,
      'eval/pgd/40': 4.5,
      'eval/pgd/320': 13.5,
      'eval/alive/positions': 4096,
    },
    ...{ 'eval/alive/n_mean_ci': 17, 'eval/ce_kl/kl_alive_mean_ci': 0.0321, 'eval/l0/0.01_total': 6.54 },
    ...{ 'eval/l0/0.1_total': 5.43, 'eval/loss/RelativeFaithfulnessLoss/worst': 0.25 },
    'eval/loss/RelativeFaithfulnessLoss/mean': 0.0625,
    ...Object.fromEntries([
      ...bins.flatMap(bin => perModule(`g_bins/${bin}_`, bin === '0' ? 4 : bin === '1' ? 1.5 : 0.1)),
      ...['0.0', '0.01', '0.1'].flatMap((t, i) => perModule(`l0/${t}_`, 2 - i / 10)),
      ...perModule('z/min/', -34.5),
      ...perModule('z/max/', 12.5),
      ...perModule('loss/RelativeFaithfulnessLoss/', 0.03),
      ['eval/loss/RelativeFaithfulnessLoss/h.1.attn.q_proj', 0.25],
    ]),
  };
  const url = write('measures.html', { ...run, metrics: { ...run.metrics, ...measures } });
  await using(url, async page => {
    await sees(page, '.tile', /Worst module\s*0\.250[\s\S]*h\.1\.attn\.q_proj/);
    await sees(page, '.tile', /L0\s*7\.89[\s\S]*6\.54 above 0\.01\. 5\.43 above 0\.1/);
    await sees(page, '.tile', /13\.5 after 320 steps, still rising/);
    await sees(page, '.tile', /4,096 training positions: 17/);
    const rungs = page.getByRole('table', { name: 'KL by the adversary’s steps' }).locator('tbody tr');
    assert.deepEqual(await rungs.locator('th').allInnerTexts(), ['none: a random start', '20', '40', '320']);
    await sees(page, '#overview table tr', /alive only\s*0\.0321/);
    const line = page.getByRole('table', { name: 'Importances by module' }).locator('tr', { hasText: paths[1]! });
    assert.match(await line.innerText(), /5 \/ 6\s+2\s+1\.90\s+1\.80\s+−34\.5\s+12\.5\s+0\.0300/);
    const width = async (part: string) => (await line.locator(part).boundingBox())!.width;
    const ones = (await width('.bins i:last-child')) / (await width('.bins'));
    assert.ok(Math.abs(ones - 0.75) < 0.02, `1.5 of 2 are exactly 1, and the bar says ${ones}`);
    await showsTip(page, line.locator('.bins'), 'exactly 1: 1.50');
    await fitsTheWidth(page);
  });
  const flat = { ...run.metrics, ...measures, 'eval/pgd/flat_from': 40 };
  await using(write('flat.html', { ...run, metrics: flat }), async page => {
    await sees(page, '.card', 'from 40 steps on, twice as many add less than 5 %');
  });
  await using(write('without.html', run), async page => {
    await sees(page, '#overview', '7.89');
    assert.equal(await page.getByText('ladder').count(), 0);
    assert.equal(await page.getByRole('table', { name: 'L0 and alive components by module' }).count(), 1);
  });
});

test('every view works by keyboard', options, async () => {
  await using(write('keys.html', makeRun(2, 6, ordinary)), async page => {
    const press = async (...keys: string[]) => {
      for (const key of keys) await page.keyboard.press(key);
    };
    assert.equal(await shown(page), 'overview');
    await press('?');
    await sees(page, '#help', 'Keyboard');
    await press('Escape', '2');
    assert.equal(await shown(page), 'components');
    await press('j');
    const second = hash(page);
    await press('ArrowDown', 'k', 'ArrowUp', 'j');
    assert.equal(hash(page), second);
    assert.equal(`#${await page.locator('#detail h2').innerText()}`, second);
    assert.equal(`#${await page.locator('#rows [aria-current] .mono >> nth=0').innerText()}`, second);
    await press('/');
    await page.keyboard.type('h.1.mlp.c_fc:3');
    await press('Enter');
    assert.equal(hash(page), '#h.1.mlp.c_fc:3');
    await press('3', 'ArrowRight', 'ArrowRight', 'ArrowLeft', 'j', 'j');
    assert.equal(hash(page), '#prompt/1/1/h.0.mlp.c_fc:1');
    await press(']');
    assert.equal(hash(page), '#prompt/2/0/h.0.mlp.c_fc:1');
    await press('[', 'Enter');
    assert.equal(hash(page), '#h.0.mlp.c_fc:1');
    const background = () => page.evaluate('getComputedStyle(document.body).backgroundColor');
    const light = await background();
    await press('d');
    assert.notEqual(await background(), light);
    await press('1');
    await page.locator('.tab').first().focus();
    await press('Tab', 'Tab', 'Enter');
    await page.locator('#prompt').waitFor(); // a link acts in a task of its own
    assert.equal(await shown(page), 'prompt');
  });
});

test('addresses open components, passages and tokens; unknown ones say so', options, async () => {
  const url = write('addresses.html', makeRun(1, 6, ordinary));
  await using(`${url}#h.0.mlp.c_fc:3`, async page => {
    await sees(page, '#detail h2', 'h.0.mlp.c_fc:3');
    await page.goto(`${url}#h.0.mlp.c_fc:5`);
    await sees(page, '#detail .notice', 'fired at none of the 1,000 positions');
    for (const bad of ['h.0.mlp.c_fc:6', 'h.9.mlp.c_fc:0', '%E0%A4%A', '<b>x</b>']) {
      await page.goto(`${url}#${bad}`);
      await sees(page, '#notice', 'This run has no');
    }
    await page.goto(`${url}#prompt/2/3`);
    await sees(page, '#tokens [aria-pressed=true]', '.');
    await page.goto(`${url}#prompt/99/99`);
    await sees(page, '#tokens [aria-pressed=true]', 'the');
    assert.equal(await page.locator('#notice').isVisible(), false);
  });
});

test('hostile token texts stay text', options, async () => {
  const url = write('hostile.html', makeRun(1, 24, HOSTILE));
  await using(url, async page => {
    await sees(page, '#overview', '<img src=x');
    for (const at of ['h.0.attn.q_proj:1', 'h.0.mlp.c_fc:7', 'prompt/1/0', 'prompt/2/5', 'overview']) {
      await page.goto(`${url}#${at}`);
      await page.locator('main > section:visible').waitFor();
    }
    for (const text of HOSTILE) {
      await page.goto(`${url}#components`);
      await page.locator('#search').fill(text);
    }
    const scripts = await page.evaluate('document.scripts.length');
    const strays = await page.evaluate(
      'document.querySelectorAll("img, b:not(.tile b, .stats b), i:not(.meter i), body script ~ :not(script)").length',
    );
    assert.deepEqual([scripts, strays, await page.evaluate('window.hit ?? "no"')], [2, 0, 'no']);
    // not even as invisible characters that turn or hide what is beside them
    const rest: string = await page.evaluate('document.body.innerText');
    assert.doesNotMatch(rest, /[\u200b\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\ufeff]|(?!\n|\t)\p{Cc}|\p{Cs}/u);
    await page.goto(`${url}#prompt/1/0`);
    const tokens = await page.locator('#tokens button').allTextContents();
    assert.equal(tokens[0], HOSTILE[0]);
    assert.equal(tokens[10], '␀␁␈␛[31m‹007f›‹009f›');
    assert.equal(tokens[12], '\ufffd');
    assert.equal(tokens[14], '‹202e›dlrow‹202c› ‹200f›‹061c›‹2066›');
    assert.equal(tokens[16], '∅');
  });
});

test('10,000 components: only the rows in sight exist, and going through them is quick', options, async () => {
  const run = makeRun(5, 1001, ordinary);
  assert.equal(run.harvest.components.length, 10_000);
  await using(`${write('large.html', run)}#components`, async page => {
    await sees(page, '#count', '10,000 components');
    const rows = page.locator('#rows li');
    assert.ok((await rows.count()) < 60);
    const height = await page.evaluate('document.querySelector("#rows").offsetHeight');
    await page.evaluate('document.querySelector("#list").scrollTop = 300000');
    await page.locator('#rows li[aria-posinset="5003"]').waitFor();
    assert.ok((await rows.count()) < 60);
    assert.equal(await page.evaluate('document.querySelector("#rows").offsetHeight'), height);
    const started = performance.now();
    await page.locator('#search').fill('roar');
    await page.locator('#sort').selectOption('density');
    await page.keyboard.press('Tab');
    for (let i = 0; i < 20; i++) await page.keyboard.press('j');
    await page.goto(`${page.url().split('#')[0]}#h.4.mlp.c_fc:999`);
    await sees(page, '#detail h2', 'h.4.mlp.c_fc:999');
    assert.ok(performance.now() - started < 5000, 'search, sort and 20 steps');
  });
});

test('a phone: list and component one after the other, nothing sticks out', options, async () => {
  const phone = { width: 375, height: 700 };
  await using(
    write('phone.html', makeRun(2, 6, HOSTILE)),
    async page => {
      await fitsTheWidth(page);
      await page.getByRole('link', { name: 'Components' }).click();
      await fitsTheWidth(page);
      assert.equal(await page.locator('#detail').isVisible(), false);
      await page.locator('#rows a').first().click();
      await page.locator('#detail h2').waitFor();
      await fitsTheWidth(page);
      await page.getByRole('link', { name: 'All components' }).click();
      await page.locator('#search').waitFor();
      await page.getByRole('link', { name: 'Prompt' }).click();
      await fitsTheWidth(page);
    },
    phone,
  );
});

test('a run without evaluation, labels, passages or any firing still has its page', options, async () => {
  const { harvest, config } = makeRun(1, 4, ordinary);
  const modules = harvest.modules.map(module => ({ ...module, alive: 0, meanCi: [0, 0, 0, 0] }));
  const bare = { ...harvest, modules, components: [], passages: [] };
  await using(write('bare.html', { config, metrics: {}, history: [], harvest: bare }), async page => {
    await sees(page, '#overview', 'no evaluation');
    await page.keyboard.press('2');
    await sees(page, '#detail', 'No component fired');
    await page.keyboard.press('j');
    await page.keyboard.press('3');
    await sees(page, '#prompt', 'no held-out passages');
    await page.keyboard.press('ArrowRight');
    await page.keyboard.press(']');
  });
});

// ---- Groups and labels ----------------------------------------------------------------------------------------------

test('groups and labels: the view, a group, a label with its scores; hostile labels stay text', options, async () => {
  const run = makeRun(2, 6, ordinary);
  const hostile = HOSTILE[1]!;
  const scores = [
    { kind: 'detection', score: 0.875, chance: 0.5 },
    { kind: 'fuzzing', score: null, chance: 0.5 },
    { kind: 'intruder', score: 0.625, chance: 0.2, tokenOverlap: 0.375 },
  ];
  const label = { label: 'lions that roar', confidence: 0.5, reason: 'they roar', model: 'made-up-1' };
  const meanings = {
    groups: {
      ...{ alpha: 1, tau: 0.1, positions: 1000, leaves: 20, best: 18 },
      L: [[20, 9.5], [2, 3.25], [1, 4]] as [number, number][], // biome-ignore format: a line
      alphas: [{ alpha: 10, L: 1, groups: 7, several: 4, shareSpanningModules: 0.75, shareSpanningLayers: 0.25 }],
      list: [
        { columns: [0, 1, 2, 3, 4, 6, 7, 8, 9, 10], active: 120 },
        { columns: [12, 13], active: 30 },
      ],
    },
    labels: {
      1: { ...label, graph: 'roars after lions', scores },
      2: { ...label, label: hostile, reason: HOSTILE[0]!, model: HOSTILE[2]!, scores: [] },
    },
  };
  await using(write('groups.html', { ...run, ...meanings }), async page => {
    await page.getByRole('link', { name: 'Groups', exact: true }).click();
    assert.equal(await shown(page), 'groups');
    for (const text of ['2 groups of components', '20 components', '9.5', '3.25']) await sees(page, '#groups', text);
    await sees(page, '#groups tr', /10\s*7\s*4\s*75 %\s*25 %/);
    await page.getByRole('link', { name: 'group 1', exact: true }).click();
    assert.equal(hash(page), '#groups/1');
    await sees(page, '#group tr', 'lions that roar');
    assert.equal(await page.locator('#group tbody tr').count(), 8);
    await page.getByRole('button', { name: 'All 10' }).click();
    assert.equal(await page.locator('#group tbody tr').count(), 10);
    await page.locator('#group').getByRole('link', { name: 'h.0.attn.q_proj:1' }).click();
    await sees(page, '#meaning h3', 'lions that roar');
    for (const text of ['they roar', 'made-up-1', 'roars after lions', '10 components'])
      await sees(page, '#meaning', text);
    await sees(page, '#meaning tr', /detection\s*0\.875\s*0\.500/);
    await sees(page, '#meaning tr', /fuzzing\s*unreadable/);
    await sees(page, '#meaning tr', /intruder\s*0\.625\s*0\.200\s*token overlap alone 0\.375/);
    await page.keyboard.press('4');
    assert.equal(await shown(page), 'groups');
    await page.goto(`${page.url().split('#')[0]}#h.0.attn.q_proj:2`);
    await sees(page, '#meaning h3', '<img src=x');
    await page.keyboard.press('/');
    await page.keyboard.type('lions that');
    await sees(page, '#count', '1 component');
    assert.equal(await page.evaluate('window.hit'), undefined);
    await fitsTheWidth(page);
  });
  await using(write('no-groups.html', run), async page => {
    assert.equal(await page.locator('#groups-tab').isVisible(), false);
    await page.keyboard.press('4');
    assert.equal(await shown(page), 'overview');
  });
});

test('graph, neighbours, circuits and edits, by keyboard and in words; hostile texts stay text', options, async () => {
  const run = makeRun(2, 6, [HOSTILE[1]!, ...ordinary.slice(1)]);
  const { tokens } = run.harvest.passages[0]!;
  const strings = tokens.map(t => run.harvest.vocabulary[t]!);
  // embeddings of both tokens; h.0.attn.q_proj:1 and h.1.mlp.c_fc:2 after the second; its next token
  const graph: PackedGraph = {
    ...{ tokens, strings, names: { 3: HOSTILE[0]! } },
    nodes: [
      [0, 0, tokens[0]!, 0, 0, 1],
      [0, 1, tokens[1]!, 0, 0, 1],
      [1, 1, 1, 0.75, -2, 0.5],
      [1, 1, 20, 0.5, 3, 0.625],
      [2, 1, 3, 0.875, 0, 0.25],
    ],
    edges: [0, 2, -0.125, 1, 2, 0.5, 2, 3, 1.5, 3, 4, 2.5],
  };
  const [q, fc] = run.harvest.modules.map(m => m.path) as [string, string];
  const regime = { regime: 'only these', token: HOSTILE[2]!, probability: 0.5, kl: 0.25 };
  const parts = {
    graphs: [graph],
    neighbours: { 1: [[[-1 - tokens[1]!, 3.5, 4, null]], [[20, -1.5, 2, 0.75]]] },
    circuits: [
      {
        text: HOSTILE[0],
        nodes: [{ position: 1, module: q, index: 1, ci: 0.5 }],
        alive: 7,
        interventions: [regime],
        control: [regime],
      },
    ],
    edits: [
      {
        ...{ folder: HOSTILE[1], positions: 100, firing: 8, kl: 0.5, klFiring: 1.25, klElsewhere: 0.125 },
        ...{ edits: [{ module: q, index: 1, factor: 0 }, { module: fc, index: 0, factor: 2 }], write: null }, // biome-ignore format: a line
      },
      {
        ...{ folder: 'b', positions: 100, firing: 0, kl: 0, klFiring: null, klElsewhere: 0, edits: [] },
        write: { module: q, index: 2, strength: 4 },
        token: { id: 3, text: HOSTILE[2], before: null, after: null },
      },
    ],
  };
  await using(write('parts.html', { ...run, ...parts } as ReportData), async page => {
    const words = (selector: string) => page.locator(selector).innerText();
    await sees(
      page,
      '.edits-card tr',
      /q_proj:1 removed\s*h\.0\.mlp\.c_fc:0 times 2\s*<img src=x.*8 of 100\s*1\.25\s*0\.125/s,
    );
    await sees(page, '.edits-card tr', /q_proj:2 writes <!--<script> with 4\s*b\s*0 of 100\s*–/);
    assert.doesNotMatch(await words('#overview'), /\b(null|undefined|NaN)\b/);
    await page.keyboard.press('3');
    await page.keyboard.press('ArrowRight');
    const card = page.locator('.graph-card');
    const chosen = card.locator('h4');
    const feeds = (list: string) => card.locator(`ol[aria-label="${list}"] button`);
    // arrived at by keys alone: the next token, what feeds it, what feeds that
    assert.match(await chosen.innerText(), /^next token .*87\.5 %.* position 1$/);
    for (const name of [/^h\.1\.mlp\.c_fc:2 at/, /^h\.0\.attn\.q_proj:1 at/]) {
      await feeds('Fed by').first().focus();
      await page.keyboard.press('Enter');
      assert.match(await chosen.innerText(), name);
      assert.equal(await page.evaluate('document.activeElement.tagName'), 'H4', 'the next Tab goes on in the lists');
    }
    assert.match(await words('.graph-lists'), /CI 0\.75\d*, activation −2.*50 %/s);
    assert.equal(await feeds('Fed by').count(), 2);
    assert.equal(await feeds('Feeds').count(), 1);
    assert.equal(await card.locator('svg').getAttribute('aria-hidden'), 'true');
    assert.equal(await card.locator('path.negative').count(), 1);
    await sees(page, '.circuit-card tr', /only these\s*<!--<script>\s*50 %\s*0\.25/);
    await page.goto(`${page.url().split('#')[0]}#${q}:1`);
    await sees(page, '#detail tr', /lion\s*3\.5/);
    await sees(page, '#detail tr', /c_fc:2\s*−?-?1\.5/);
    assert.equal(await page.locator('#detail .edits-card tbody tr').count(), 1);
    assert.equal(await page.evaluate('window.hit'), undefined);
    assert.equal(await page.locator('img').count(), 0);
    await fitsTheWidth(page);
  });
  await using(pathToFileURL(path.join(folder, 'parts.html')).href, async page => {
    await page.keyboard.press('3');
    await fitsTheWidth(page);
  }, { width: 390, height: 800 }); // biome-ignore format: as above
});

test('the page takes groups and labels of the same components only', () => {
  const dir = fs.mkdtempSync(path.join(folder, 'run-'));
  fs.writeFileSync(path.join(dir, 'components.safetensors'), 'a');
  const harvested = { modules: makeRun(1, 3, ordinary).harvest.modules };
  assert.deepEqual(readMeanings(dir, harvested), {});
  const components = componentsHash(dir);
  const [q, fc] = harvested.modules.map(m => m.path) as [string, string];
  const clusters = {
    ...{ formatVersion: 1, components, alpha: 1, tau: 0.1, positions: 10, alphas: [], best: 1 },
    leaves: [[q, 0], [fc, 1]], // biome-ignore format: a line
    L: [50, 40],
    groups: [{ members: [[q, 0], [fc, 1]], active: 4 }], // biome-ignore format: a line
  };
  fs.writeFileSync(path.join(dir, 'clusters.json'), JSON.stringify(clusters));
  const lines = [
    { kind: 'settings', formatVersion: 1, components },
    {
      module: fc,
      index: 1,
      kind: 'label',
      result: { label: 'x', confidence: null, reason: '' },
      model: 'm',
      tokens: 1,
    },
    { module: fc, index: 1, kind: 'detection', result: { score: 1, chance: 0.5, trials: 5 }, model: 'm', tokens: 1 },
    { module: q, index: 0, kind: 'label', result: { label: null }, model: 'm', tokens: 1 },
  ];
  fs.writeFileSync(path.join(dir, 'interpretations.jsonl'), lines.map(line => `${JSON.stringify(line)}\n`).join(''));
  const { groups, labels } = readMeanings(dir, harvested);
  assert.deepEqual(groups?.list, [{ columns: [0, 4], active: 4 }]);
  assert.deepEqual(groups?.L, [[2, 5], [1, 4]]); // biome-ignore format: a line
  const scores = [{ kind: 'detection', score: 1, chance: 0.5 }];
  assert.deepEqual(labels, { 4: { label: 'x', confidence: null, reason: '', model: 'm', scores } });
  assert.throws(() => writePage(dir), /has no harvest\.json; harvest --run/);
  fs.writeFileSync(path.join(dir, 'harvest.json'), JSON.stringify(makeRun(1, 3, ordinary).harvest));
  writePage(dir);
  const page = fs.readFileSync(path.join(dir, 'report.html'), 'utf8');
  assert.ok(page.includes('"label":"x"') && page.includes('"columns":[0,4]'));
  fs.writeFileSync(path.join(dir, 'components.safetensors'), 'b');
  assert.deepEqual(readMeanings(dir, harvested), {});
  fs.writeFileSync(path.join(dir, 'clusters.json'), '{');
  assert.deepEqual(readMeanings(dir, harvested), {});
});
