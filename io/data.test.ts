// Documents of every kind of file, read as a stream; and rows of a corpus that is kept in a file.

import assert from 'node:assert/strict';
import fs from 'node:fs';
import http from 'node:http';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { documents, loadRows, writeCorpus } from '../io/data.ts';
import { loadTokenizer } from '../io/tokenizer.ts';
import { UsageError } from '../io/usage-error.ts';

const fixtures = path.join(import.meta.dirname, '../tools/fixtures/data');
const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'data-'));
after(() => fs.rmSync(folder, { recursive: true }));

type Reading = NonNullable<Parameters<typeof documents>[1]>;
async function read(source: string, reading: Partial<Reading> = {}) {
  const all: (string | number[])[] = [];
  const say = (warning: string) => assert.fail(warning);
  for await (const document of documents(source, { marks: ['<|endoftext|>'], say, ...reading })) all.push(document);
  return all;
}
/** The documents of a .jsonl file of such records, and the warnings without the file's name. */
async function readRecords(records: object[], reading: Partial<Reading> = {}) {
  const warnings: string[] = [];
  const say = (warning: string) => void warnings.push(warning.replace(/^.*?: /, ''));
  const file = write('records.jsonl', records.map(record => `${JSON.stringify(record)}\n`).join(''));
  return { documents: await read(file, { say, ...reading }), warnings };
}
function write(name: string, content: string | Uint8Array): string {
  const file = path.join(folder, name);
  fs.writeFileSync(file, content);
  return file;
}
const refused = (promise: Promise<unknown>, message: RegExp) =>
  assert.rejects(promise, (error: Error) => {
    assert.ok(error instanceof UsageError, error.stack);
    assert.match(error.message, message);
    assert.doesNotMatch(error.message, /\n/);
    return true;
  });

test('text: a document a line, or between blank lines', async () => {
  assert.deepEqual(await read(write('a.txt', '\ufeffone\ntwo \r\n\n\n')), ['one', 'two']);
  assert.deepEqual(await read(write('a.txt', 'one\nmore\n \t\ntwo\r\n\r\n\r\nthree')), ['one\nmore', 'two', 'three']);
  assert.deepEqual(await read(write('a.txt', 'one\u2028still one\ntwo')), ['one\u2028still one', 'two']);
  assert.deepEqual(await read(write('a.txt', '')), []);
  assert.deepEqual(await read(write('a.txt', ' \n\n ')), []);
  const long = Array.from({ length: 40_000 }, (_, i) => `line ${i}:${'é😀'.repeat(i % 40)}`); // several chunks
  assert.deepEqual(await read(write('a.txt', long.join('\n'))), long);
  await refused(read(write('a.txt', Uint8Array.of(97, 10, 0xff, 98))), /a\.txt: is not UTF-8/);
  await refused(read(write('a.txt', Uint8Array.of(97, 10, 0xc3))), /is not UTF-8/);
});

test('text: lines end in \\n, \\r\\n or \\r', async () => {
  const text = 'one\nmore of it\n\ntwo\n \nthree\n';
  for (const end of ['\r\n', '\r'])
    assert.deepEqual(await read(write('a.txt', text.replaceAll('\n', end))), ['one\nmore of it', 'two', 'three']);
  assert.deepEqual(await read(write('a.txt', 'one\rtwo\r')), ['one', 'two']);
  // a chunk of the file ends between \r and \n
  const long = 'x'.repeat((1 << 20) - 6);
  assert.deepEqual(await read(write('a.txt', `a\n\nb\n${long}\r\nrest\r\n\r\nnext\r`)), [
    'a',
    `b\n${long}\nrest`,
    'next',
  ]);
  assert.deepEqual(await read(write('a.jsonl', '{"text":"a\\r\\nb\\rc"}\r{"text":"d"}')), ['a\nb\nc', 'd']);
});

test('text: a line that is only an end-of-text mark separates documents, blank lines then do not', async () => {
  const text = 'one\n\nstill one\n <|endoftext|> \n<|endoftext|>\n\ntwo\n\n';
  assert.deepEqual(await read(write('a.txt', text)), ['one\n\nstill one', 'two']);
  assert.deepEqual(await read(write('a.txt', text.replaceAll('\n', '\r\n'))), ['one\n\nstill one', 'two']);
  const late = `${'one, which is long\n\n'.repeat(70_000)}<|endoftext|>\ntwo`; // beyond the first megabyte
  assert.equal((await read(write('a.txt', late))).length, 2);
  const own = { marks: ['<|endoftext|>', '</s>'] };
  assert.deepEqual(await read(write('a.txt', 'one\n\nmore\n</s>\ntwo\n'), own), ['one\n\nmore', 'two']);
  assert.deepEqual(await read(write('a.txt', 'one\n\nmore\n</s>\n')), ['one', 'more\n</s>']);
  assert.deepEqual(await read(write('a.txt', 'a <|endoftext|> inside\nb')), ['a <|endoftext|> inside', 'b']);
});

test('every reader skips what has nothing in it, and makes line ends one', async () => {
  const odd = ['one', 'two\nlines', 'old\nmac', 'three <|endoftext|>'];
  for (const type of ['jsonl', 'parquet']) assert.deepEqual(await read(path.join(fixtures, `odd.${type}`)), odd, type);
  assert.deepEqual(await read(write('a.txt', odd.join('\n<|endoftext|>\n\n \n<|endoftext|>\r\n'))), odd);
  const empty = await readRecords([
    { text: null },
    { input_ids: [] },
    { input_ids: null },
    { story: ' ' },
    { text: 'a' },
  ]);
  assert.deepEqual(empty, { documents: ['a'], warnings: [] });
});

test('a record is its ids, if it has such a field, without what attention_mask leaves out', async () => {
  for (const type of ['jsonl', 'parquet'])
    assert.deepEqual(
      await read(path.join(fixtures, `both.${type}`)),
      [
        [1, 2],
        [6, 7, 7, 7],
      ],
      type,
    );
  const { documents } = await readRecords([
    { story: 'a', topic: 'b' },
    { input_ids: [1, 2, 3], attention_mask: [1, 2, 2] }, // of packed texts, numbered
    { input_ids: [1, 2, 3], attention_mask: [false, true, true] },
  ]);
  assert.deepEqual(documents, ['a', [1, 2, 3], [2, 3]]);
  const cases: [RegExp, object][] = [
    [/records\.jsonl:1: has 2 input_ids, and an attention_mask of 1$/, { input_ids: [1, 2], attention_mask: [1] }],
    [/:1: attention_mask is a list of lists; takes a list of numbers$/, { input_ids: [1], attention_mask: [[1]] }],
    [/:1: attention_mask is a number; takes/, { input_ids: [1], attention_mask: 1 }],
    [/:1: input_ids is a string; takes a list of numbers$/, { input_ids: 'a' }],
    [/:1: input_ids is a list of strings; takes/, { input_ids: [1, 'a'] }],
    [/:1: text is an object; takes a string$/, { text: { raw: 'a' } }],
    [/:1: text is a list of objects; takes a string$/, { text: [{ role: 'user' }] }],
    [/:1: text is a list of numbers; takes a string$/, { text: [1, 2] }],
    [/:1: takes \{"text": …\} or .*, and this has title, content$/, { title: 'a', content: 'b' }],
  ];
  for (const [message, record] of cases) await refused(readRecords([record]), message);
});

test('padding without attention_mask: what is known as such is left out, with a warning', async () => {
  const byLabel = 'token 9 at the end of rows, with labels of -100, is left out as padding';
  const byId = 'token 9 at the ends of rows, the pad_token_id, is left out';
  const prompt = 'labels are not read: positions with -100 inside rows are trained on like the others';
  for (const type of ['jsonl', 'parquet']) {
    const warnings: string[] = [];
    const say = (warning: string) => void warnings.push(warning.replace(/^.*?: /, ''));
    const rows = await read(path.join(fixtures, `padded.${type}`), { say });
    assert.deepEqual(
      rows,
      [
        [5, 6, 7],
        [5, 6, 7, 8, 9],
      ],
      type,
    );
    assert.deepEqual(warnings, [byLabel, prompt]);
  }
  const cases: [number[], number[], Partial<Reading>, string[]][] = [
    [[1, 2, 9, 9], [1, 2], { pad: 9 }, [byId]],
    [[9, 9, 1, 9, 2], [1, 9, 2], { pad: 9 }, [byId]],
    [[1, 2, 9, 9], [1, 2, 9], { pad: 9, endOfText: 9 }, [byId]], // the text ended once
    [[9, 9, 1, 2], [9, 1, 2], { pad: 9, endOfText: 9 }, [byId]],
    [[9, 1, 2, 9], [9, 1, 2, 9], { pad: 9, endOfText: 9 }, []],
    [[1, 2, 9, 9], [1, 2, 9, 9], { pad: 0 }, []],
  ];
  for (const [input_ids, ids, reading, warnings] of cases)
    assert.deepEqual(await readRecords([{ input_ids }], reading), { documents: [ids], warnings });
  // all padding is no document; and where there is a mask, nothing else is asked
  assert.deepEqual((await readRecords([{ input_ids: [9, 9] }], { pad: 9 })).documents, []);
  const masked = { input_ids: [1, 9], attention_mask: [1, 1], labels: [1, -100] };
  assert.deepEqual(await readRecords([masked], { pad: 9 }), { documents: [[1, 9]], warnings: [] });

  // what nobody has said is kept, but not without a word; rows that differ at their ends are no such case
  const suspicious = (ids: (i: number) => number[]) => {
    const rows = Array.from({ length: 200 }, (_, i) => ids(i));
    return readRecords(rows.map(input_ids => ({ input_ids })));
  };
  const { documents, warnings } = await suspicious(i => [i, i + 1, 3, 3, 3, 3]);
  assert.equal(documents.length, 200);
  assert.deepEqual(warnings, [
    'most rows end in a run of token 3: if that is padding, it is trained on; an attention_mask leaves it out',
  ]);
  assert.deepEqual((await suspicious(i => [i, i, i, i, i])).warnings, []);
  assert.deepEqual((await suspicious(i => [1, 2, 3, 3, i % 3 ? 4 : 3, 3])).warnings, []);
});

test('a folder is no corpus, whatever its name', async () => {
  const dir = path.join(folder, 'dir.txt');
  fs.mkdirSync(dir);
  await refused(read(dir), /dir\.txt: is not a file/);
});

test('jsonl: texts or ids, and errors with the line', async () => {
  const lines = [{ text: 'a\u2028\n"b"' }, { input_ids: [1, 2] }, { text: '' }].map(l => JSON.stringify(l));
  assert.deepEqual(await read(write('a.jsonl', `${lines.join('\r\n')}\n\n`)), ['a\u2028\n"b"', [1, 2]]);
  await refused(read(write('a.jsonl', '{"text":"a"}\n{"text":')), /a\.jsonl:2: .*JSON/);
  for (const line of ['null', '3', '{"text":5}', '{"title":"a"}', '[1]'])
    await refused(
      read(write('a.jsonl', `{"text":"a"}\n\n${line}`)),
      /a\.jsonl:3: (takes \{"text"|text is a number; takes a string)/,
    );
});

test('json: rows, whatever the spacing, and nothing else', async () => {
  const rows = Array.from({ length: 30_000 }, (_, i) => Array.from({ length: 16 }, (_, j) => i * j));
  for (const text of [
    JSON.stringify(rows),
    JSON.stringify(rows.slice(0, 99), null, 1),
    ' [ [1 ] , [ 2,3 ] ]\n',
    '[[]]',
  ])
    assert.deepEqual(await read(write('a.json', text)), JSON.parse(text));
  for (const text of ['', '{}', '[]', '[1,2]', '[[1,2]', '[[1],[2', '[[1]],', '[[1]][', '[[1]]]', '[[1][2]]', '[[1,]]'])
    await refused(read(write('a.json', text)), /a\.json: /);
  for (const text of ['[[1.5]]', '[[-1]]', '[["a"]]', '[[[1]]]', '[{"text":"a"}]', '[[1] [2]]', '[[1 2]]'])
    await refused(read(write('a.json', text)), /a\.json: row 0|takes/);
});

test('parquet: text, story or input_ids, in every compression', async () => {
  const texts = await read(path.join(fixtures, 'text-none.parquet'));
  assert.equal(texts.length, 50);
  assert.equal(texts[3], 'Story 3: the café — 😀 was very very very full.\nIt rained.');
  const codecs = ['snappy', 'gzip', 'brotli', ...('zstdDecompressSync' in (await import('node:zlib')) ? ['zstd'] : [])];
  for (const codec of codecs) assert.deepEqual(await read(path.join(fixtures, `text-${codec}.parquet`)), texts, codec);
  assert.deepEqual(await read(path.join(fixtures, 'story.parquet')), texts);
  const ids = Array.from({ length: 50 }, (_, i) => Array.from({ length: (i % 7) + 1 }, (_, j) => (i * j) % 97));
  for (const type of ['int32', 'int64']) assert.deepEqual(await read(path.join(fixtures, `ids-${type}.parquet`)), ids);
  await refused(read(path.join(fixtures, 'no-text.parquet')), /has columns title; takes input_ids or text/);
  const refusals: [string, RegExp][] = [
    ['text-struct', /column text is a struct \{raw, lang\}; takes string$/],
    ['text-list', /column text is a list of string; takes string$/],
    ['text-messages', /column text is a list of struct \{role, content\}; takes string$/],
    ['text-number', /column text is a int64; takes string$/],
    ['ids-double', /column input_ids is a list of double; takes list of int32 or int64$/],
    ['ids-flat', /column input_ids is a int64; takes list/],
    ['text-lz4', /text-lz4\.parquet: is compressed with LZ4_RAW; takes uncompressed, snappy, gzip, brotli or zstd$/],
  ];
  for (const [name, message] of refusals) await refused(read(path.join(fixtures, `${name}.parquet`)), message);
  if (!codecs.includes('zstd'))
    await refused(
      read(path.join(fixtures, 'text-zstd.parquet')),
      /is compressed with ZSTD, which Node 22\.15 and later reads; this is v\d/,
    );
  assert.deepEqual(await read(path.join(fixtures, 'ids-null.parquet')), [[3, Number.NaN]]); // refused as no token id
  await refused(read(write('a.parquet', 'PAR1 no parquet PAR1')), /a\.parquet: /);
  await refused(read(path.join(folder, 'none.parquet')), /no such file/);
  await refused(read(folder), /takes \.txt/);
});

test('a corpus is written once; its rows and its held-out rows are read by position', async () => {
  for (const vocab of [300, 100_000]) {
    const docs = Array.from({ length: 100 }, (_, i) =>
      Array.from({ length: i % 9 }, (_, j) => (i * 31 + j * vocab) % vocab),
    );
    const stream = async function* () {
      yield* docs;
    };
    const file = path.join(folder, 'tokens.bin');
    const corpus = await writeCorpus(file, stream(), vocab, { seqLen: 8, heldOutShare: 0.05 });
    assert.deepEqual(
      fs.readdirSync(folder).filter(name => name.startsWith('tokens')),
      ['tokens.bin'],
    );
    const all = (rows: typeof corpus.train) => Array.from({ length: rows.count }, (_, i) => [...rows.row(i)]);
    const cut = (tokens: number[]) =>
      Array.from({ length: Math.floor(tokens.length / 8) }, (_, i) => tokens.slice(8 * i, 8 * i + 8));
    assert.deepEqual(all(corpus.train), cut(docs.slice(0, 95).flat()));
    assert.deepEqual(all(corpus.heldOut), cut(docs.slice(95).flat()));
  }
  let given = 0;
  const endless = async function* () {
    for (;;) yield [given++ % 50];
  };
  const options = { seqLen: 10, heldOutShare: 0.1, enough: 1000 };
  const few = await writeCorpus(path.join(folder, 'few.bin'), endless(), 50, options);
  assert.deepEqual([few.train.count, few.heldOut.count, given], [90, 10, 1000]);
});

test('a corpus that does not fit in memory gives the same rows, from a file', async () => {
  const seqLen = 5;
  const texts = Array.from({ length: 100 }, (_, i) =>
    Array.from({ length: 1 + (i % 13) }, (_, k) => (7 * i + k) % 300),
  );
  const data = write('corpus.jsonl', texts.map(ids => JSON.stringify({ input_ids: ids })).join('\n'));
  const common = { tokenizer: undefined, endOfText: undefined, vocab: 300, context: 64, contextField: 'n_ctx' };
  const options = { ...common, seqLen, rows: 1000, file: path.join(folder, 'run/tokens.bin') };
  const all = ({ count, row }: Awaited<ReturnType<typeof loadRows>>['train']) =>
    Array.from({ length: count }, (_, i) => [...row(i)]);
  const inMemory = await loadRows(data, '', options);
  assert.ok(!fs.existsSync(options.file));
  const onDisk = await loadRows(data, '', { ...options, inMemory: 100 });
  assert.ok(fs.existsSync(options.file));
  assert.ok(inMemory.train.count > 100 && inMemory.heldOut.count > 5);
  assert.deepEqual(all(onDisk.train), all(inMemory.train));
  assert.deepEqual(all(onDisk.heldOut), all(inMemory.heldOut));

  // only what the run will see is kept, in rows that are as long as those of the file
  const rows = write('rows.json', JSON.stringify(Array.from({ length: 400 }, () => Array(40).fill(1))));
  const some = await loadRows(rows, '', { ...options, rows: 60, inMemory: 100 });
  assert.equal(some.train.seqLen, 40);
  assert.ok(some.train.count >= 60 && some.train.count < 100, `${some.train.count} rows`);
  await refused(
    loadRows(rows, '', { ...options, context: 30 }),
    /rows of 40 tokens; takes 2 to 30 \(the target's n_ctx\)/,
  );
  await refused(loadRows(data, '', { ...options, vocab: 200 }), /corpus\.jsonl: 2\d\d is no token id of the model/);
});

// ---- Rows ----

const stories = loadTokenizer(path.join(import.meta.dirname, '../tools/fixtures/tokenizers/llama2'));
const gpt2 = loadTokenizer(path.join(import.meta.dirname, '../tools/fixtures/tokenizers/gpt2'));
/** Rows of a source, the ids of all of them, and the warnings. */
async function rowsOf(data: string, more: Partial<Parameters<typeof loadRows>[2]> = {}) {
  const warnings: string[] = [];
  const corpus = await loadRows(data, '', {
    ...{ seqLen: 4, tokenizer: gpt2, endOfText: 0, vocab: 1200, context: 64, contextField: 'n_ctx' },
    ...{ rows: 4, file: path.join(folder, 'run/tokens.bin'), say: warning => void warnings.push(warning) },
    ...more,
  });
  const ids = [corpus.train, corpus.heldOut].flatMap(({ count, row }) =>
    Array.from({ length: count }, (_, i) => [...row(i)]).flat(),
  );
  return { ...corpus, ids, warnings };
}

test('end-of-text: one that is no token is not added, and that is said', async () => {
  const texts = write('texts.txt', 'the cat sat on the mat\n'.repeat(40));
  const count = (ids: number[], id: number) => ids.filter(other => other === id).length;
  const right = await rowsOf(texts);
  assert.ok(count(right.ids, 0) >= 36); // some are in the rows that are not full
  assert.deepEqual(right.warnings, []);
  const cases: [number | undefined, RegExp][] = [
    [
      1200,
      /^config\.json: eos_token_id 1200 is no token of the model \(0 to 1199\); documents are joined without a mark/,
    ],
    [-1, /^config\.json: eos_token_id -1 is no token of the model/],
    [1199, /^config\.json: eos_token_id 1199 is no token of tokenizer\.json; documents/],
    [undefined, /^config\.json has no eos_token_id: documents are joined without a mark between them$/],
  ];
  for (const [endOfText, message] of cases) {
    const { ids, warnings } = await rowsOf(texts, { endOfText });
    assert.equal(
      ids.findIndex(id => id === 0 || id === endOfText),
      -1,
    );
    assert.equal(warnings.length, 1);
    assert.match(warnings[0]!, message);
  }
  // no word where none is needed: begin-of-text marks the border, or there are only ids
  assert.deepEqual((await rowsOf(texts, { tokenizer: stories, endOfText: undefined })).warnings, []);
  const rows = write('ids.jsonl', '{"input_ids":[1,2,3,4,5]}\n'.repeat(40));
  assert.deepEqual((await rowsOf(rows, { endOfText: -1 })).warnings, []);
});

test('end-of-text: its text separates documents, and is not doubled behind a text that ends in it', async () => {
  const plain = await rowsOf(write('plain.txt', 'the cat sat\nthe dog sat\n'.repeat(20)));
  const ended = await rowsOf(write('ended.txt', 'the cat sat<|endoftext|>\nthe dog sat<|endoftext|>\n'.repeat(20)));
  const apart = await rowsOf(write('apart.txt', 'the cat sat\n<|endoftext|>\nthe dog sat\n<|endoftext|>\n'.repeat(20)));
  assert.ok(plain.ids.length > 100);
  assert.deepEqual(ended.ids, plain.ids);
  assert.deepEqual(apart.ids, plain.ids);
  // the model's own mark, too: without it these were 80 documents, each with a begin-of-text
  const own = await rowsOf(write('own.txt', 'the cat\n\nsat\n</s>\n'.repeat(40)), { tokenizer: stories, endOfText: 2 });
  const known = await rowsOf(write('known.jsonl', '{"text":"the cat\\n\\nsat"}\n'.repeat(40)), { tokenizer: stories });
  assert.deepEqual(own.ids, known.ids);
});

test('a short trial reads what an evaluation needs; short documents fill a held-out row', async () => {
  const texts = Array.from({ length: 4000 }, (_, i) => JSON.stringify({ input_ids: [1, i % 50, 3] }));
  const data = write('stream.jsonl', texts.join('\n'));
  const trial = { seqLen: 24, rows: 4, inMemory: 0 };
  const one = await rowsOf(data, trial);
  assert.ok(one.train.count >= 4 && one.heldOut.count >= 1 && one.train.count < 100, `${one.train.count} rows`);
  const eight = await rowsOf(data, { ...trial, evalRows: 8 });
  assert.ok(eight.heldOut.count >= 8 && eight.train.count < 400, `${eight.train.count} rows`);
  // 40 documents of 3 tokens: two of them (5 %) are no row of 24
  const few = write('few.jsonl', texts.slice(0, 40).join('\n'));
  for (const inMemory of [0, 1e9]) {
    const { train, heldOut } = await rowsOf(few, { ...trial, inMemory });
    assert.deepEqual([train.count, heldOut.count], [4, 1]);
  }
  await refused(
    rowsOf(write('short.jsonl', texts.slice(0, 10).join('\n')), trial),
    /short\.jsonl.*: too short for one row/,
  );
  for (const text of ['', '\n<|endoftext|>\n \n'])
    await refused(rowsOf(write('none.txt', text)), /none\.txt: has no documents, or only empty ones$/);
  await refused(rowsOf(path.join(fixtures, 'ids-null.parquet')), /ids-null\.parquet: NaN is no token id of the model/);
});

test('the commit of a data set of the Hub comes with its rows', async () => {
  const commit = 'c0ffee'.padEnd(40, '0');
  const parquet = fs.readFileSync(path.join(fixtures, 'text-none.parquet'));
  const server = http.createServer(({ url, method }, response) => {
    if (url?.startsWith('/api/')) response.end(JSON.stringify({ sha: commit, siblings: [{ rfilename: 'a.parquet' }] }));
    else {
      response.writeHead(200, { etag: '"0123abc"', 'content-length': parquet.length });
      response.end(method === 'HEAD' ? undefined : parquet);
    }
  });
  await new Promise<void>(resolve => server.listen(0, '127.0.0.1', resolve));
  const before = { ...process.env };
  const { port } = server.address() as { port: number };
  Object.assign(process.env, { HF_ENDPOINT: `http://127.0.0.1:${port}`, HF_HUB_CACHE: path.join(folder, 'hub') });
  try {
    const { commit: read, heldOut } = await rowsOf('org/texts', { evalRows: 3 });
    assert.equal(read, commit);
    assert.ok(heldOut.count >= 3);
  } finally {
    server.close();
    for (const name of ['HF_ENDPOINT', 'HF_HUB_CACHE']) {
      if (before[name] === undefined) delete process.env[name];
      else process.env[name] = before[name];
    }
  }
  assert.equal('commit' in (await rowsOf(path.join(fixtures, 'text-none.parquet'))), false);
});
