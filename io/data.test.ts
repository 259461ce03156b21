// Documents of every kind of file, read as a stream; and rows of a corpus that is kept in a file.

import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { documents, loadRows, writeCorpus } from '../io/data.ts';
import { UsageError } from '../io/usage-error.ts';

const fixtures = path.join(import.meta.dirname, '../tools/fixtures/data');
const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'data-'));
after(() => fs.rmSync(folder, { recursive: true }));

async function read(source: string) {
  const all: (string | number[])[] = [];
  for await (const document of documents(source)) all.push(document);
  return all;
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
  assert.deepEqual(await read(write('a.txt', 'one\u2028still one\rand this\ntwo')), [
    'one\u2028still one\rand this',
    'two',
  ]);
  assert.deepEqual(await read(write('a.txt', '')), []);
  assert.deepEqual(await read(write('a.txt', ' \n\n ')), []);
  const long = Array.from({ length: 40_000 }, (_, i) => `line ${i}:${'é😀'.repeat(i % 40)}`); // several chunks
  assert.deepEqual(await read(write('a.txt', long.join('\n'))), long);
  await refused(read(write('a.txt', Uint8Array.of(97, 10, 0xff, 98))), /a\.txt: is not UTF-8/);
  await refused(read(write('a.txt', Uint8Array.of(97, 10, 0xc3))), /is not UTF-8/);
});

test('a folder is no corpus, whatever its name', async () => {
  const dir = path.join(folder, 'dir.txt');
  fs.mkdirSync(dir);
  await refused(read(dir), /dir\.txt: is not a file/);
});

test('jsonl: texts or ids, and errors with the line', async () => {
  const lines = [{ text: 'a\u2028\n"b"' }, { input_ids: [1, 2] }, { text: '' }].map(l => JSON.stringify(l));
  assert.deepEqual(await read(write('a.jsonl', `${lines.join('\r\n')}\n\n`)), ['a\u2028\n"b"', [1, 2], '']);
  await refused(read(write('a.jsonl', '{"text":"a"}\n{"text":')), /a\.jsonl:2: .*JSON/);
  for (const line of ['null', '3', '{"text":5}', '{"title":"a"}', '[1]'])
    await refused(read(write('a.jsonl', `{"text":"a"}\n\n${line}`)), /a\.jsonl:3: takes \{"text"/);
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
