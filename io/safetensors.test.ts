// The safetensors reader and writer: Python's files, each refusal, and thousands of broken files.
// NANO_LONG_TESTS=1 runs the long form.

import assert from 'node:assert/strict';
import crypto from 'node:crypto';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { openSafetensors, writeSafetensors } from '../io/safetensors.ts';

const fixtures = path.join(import.meta.dirname, '../tools/fixtures/safetensors');
const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'safetensors-'));
after(() => fs.rmSync(folder, { recursive: true }));
const scratch = path.join(folder, 'a.safetensors');

/** A file with this header text (spaces fill nothing here) and data. */
function pack(header: string | Uint8Array, data: Uint8Array | number = 0, headerBytes?: number | bigint): Buffer {
  const text = Buffer.from(header as string);
  const prefix = Buffer.alloc(8);
  prefix.writeBigUInt64LE(BigInt(headerBytes ?? text.length));
  return Buffer.concat([prefix, text, Buffer.from(typeof data === 'number' ? new Uint8Array(data) : data)]);
}

async function refusal(bytes: Uint8Array): Promise<string> {
  fs.writeFileSync(scratch, bytes);
  try {
    (await openSafetensors(scratch)).close();
  } catch (error) {
    assert(error instanceof Error);
    assert.equal(error.name, 'UsageError', error.stack);
    assert(error.message.startsWith(`${scratch}: `) && error.message.length <= 500);
    assert.doesNotMatch(error.message, /[\p{C}\p{Zl}\p{Zp}]/u, 'the message is one line without control characters');
    return error.message.slice(scratch.length + 2);
  }
  return 'accepted';
}

// ---- a second reader, written differently, to say what is a valid file ----

interface Entry {
  dtype: string;
  shape: bigint[];
  bytes: Buffer;
}
const BITS: Record<string, number> = {
  ...{ BOOL: 8, U8: 8, I8: 8, F8_E5M2: 8, F8_E4M3: 8, I16: 16, U16: 16, F16: 16, BF16: 16 },
  ...{ I32: 32, U32: 32, F32: 32, I64: 64, U64: 64, F64: 64, C64: 64 },
};

/** Goes through the header character by character with exact integers, and counts the owners of every data byte. */
function secondReader(file: Buffer): Map<string, Entry> {
  const check = (ok: boolean) => assert(ok, 'invalid');
  check(file.length >= 8);
  const length = file.readBigUInt64LE();
  check(length <= 100_000_000n && length <= BigInt(file.length - 8));
  const data = file.subarray(8 + Number(length));
  const raw = file.subarray(8, 8 + Number(length));
  const text = raw.toString('utf8');
  check(Buffer.from(text).equals(raw)); // else it was not UTF-8
  let at = 0;
  const blank = () => {
    while (text[at] === ' ' || text[at] === '\n' || text[at] === '\r' || text[at] === '\t') at++;
  };
  const eat = (c: string) => {
    check(text[at] === c);
    at++;
  };
  const string = () => {
    let out = '';
    for (eat('"'); text[at] !== '"'; at++) {
      check(at < text.length && text.charCodeAt(at) >= 32);
      if (text[at] !== '\\') {
        out += text[at];
        continue;
      }
      const escaped = text[++at] ?? '';
      const plain = 'bfnrt"\\/'.indexOf(escaped);
      if (escaped === 'u') {
        const digits = text.slice(at + 1, at + 5);
        check(digits.length === 4 && [...digits].every(d => '0123456789abcdefABCDEF'.includes(d)));
        out += String.fromCharCode(Number.parseInt(digits, 16));
        at += 4;
      } else {
        check(escaped !== '' && plain >= 0);
        out += '\b\f\n\r\t"\\/'[plain];
      }
    }
    at++;
    encodeURIComponent(out); // throws on a lone surrogate
    return out;
  };
  const integer = () => {
    const from = at;
    while (at < text.length && '0123456789'.includes(text[at]!)) at++;
    const digits = text.slice(from, at);
    check(digits !== '' && (digits === '0' || digits[0] !== '0'));
    const value = BigInt(digits);
    check(value < 2n ** 53n);
    return value;
  };
  const sequence = (open: string, close: string, item: () => void) => {
    eat(open);
    blank();
    if (text[at] === close) return eat(close);
    for (;;) {
      blank();
      item();
      blank();
      if (text[at] === close) return eat(close);
      eat(',');
    }
  };
  const object = (member: (key: string) => void) => {
    const seen: string[] = [];
    sequence('{', '}', () => {
      const key = string();
      check(!seen.includes(key));
      seen.push(key);
      blank();
      eat(':');
      blank();
      member(key);
    });
    return seen.sort().join();
  };
  const integers = () => {
    const list: bigint[] = [];
    sequence('[', ']', () => list.push(integer()));
    return list;
  };

  const found = new Map<string, Entry>();
  const owners = new Uint8Array(data.length);
  const spans: [number, number][] = [];
  object(name => {
    if (name === '__metadata__' && text.startsWith('null', at))
      at += 4; // as in the Rust library
    else if (name === '__metadata__') object(() => string());
    if (name === '__metadata__') return;
    let dtype = '';
    let shape: bigint[] = [];
    let offsets: bigint[] = [];
    const keys = object(key => {
      if (key === 'dtype') dtype = string();
      else if (key === 'shape') shape = integers();
      else offsets = integers();
    });
    check(keys === 'data_offsets,dtype,shape' && Object.hasOwn(BITS, dtype) && offsets.length === 2);
    const [begin, end] = offsets.map(Number) as [number, number];
    check(begin <= end && end <= data.length);
    let bits = BigInt(BITS[dtype]!);
    for (const d of shape) bits *= d;
    check(bits === BigInt(end - begin) * 8n);
    for (let i = begin; i < end; i++) owners[i]!++;
    spans.push([begin, end]);
    found.set(name, { dtype, shape, bytes: data.subarray(begin, end) });
  });
  blank();
  check(at === text.length);
  check(owners.every(n => n === 1));
  const inside = (at: number) => spans.some(([begin, end]) => begin < at && at < end);
  check(!spans.some(([begin, end]) => begin === end && inside(begin)));
  return found;
}

/** Element by element; the bits of a half are moved into a float's fields and its exponent corrected by a product. */
function secondDecoder({ dtype, bytes }: Entry): Float32Array {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const float = (bits: number) => {
    view32.setUint32(0, bits);
    return view32.getFloat32(0);
  };
  const one: Record<string, (i: number) => number> = {
    F32: i => view.getFloat32(4 * i, true),
    F64: i => Math.fround(view.getFloat64(8 * i, true)),
    BF16: i => float(view.getUint16(2 * i, true) * 65536),
    F16: i => {
      const h = view.getUint16(2 * i, true);
      const magnitude = float((h % 32768) * 8192) * 2 ** 112;
      const wide = magnitude < 65536 ? magnitude : h % 1024 ? Number.NaN : Number.POSITIVE_INFINITY;
      return h >= 32768 ? -wide : wide;
    },
  };
  return Float32Array.from({ length: (bytes.length * 8) / BITS[dtype]! }, (_, i) => one[dtype]!(i));
}
const view32 = new DataView(new ArrayBuffer(4));

/** Equal as numbers with their sign of zero; any NaN equals any NaN. */
function assertSameFloats(actual: Float32Array, expected: Float32Array, what: string) {
  assert.equal(actual.length, expected.length, what);
  for (let i = 0; i < actual.length; i++) assert(Object.is(actual[i], expected[i]), `${what} at ${i}`);
}

/** Reads a file with both readers; they must agree on whether it is valid and, if so, on every tensor. */
async function agree(bytes: Buffer, what: string): Promise<'accepted' | 'refused'> {
  let expected: Map<string, Entry> | undefined;
  try {
    expected = secondReader(bytes);
  } catch {}
  if (!expected) {
    assert.notEqual(await refusal(bytes), 'accepted', `accepted, but invalid: ${what}`);
    return 'refused';
  }
  assert.equal(await refusal(bytes), 'accepted', what);
  const file = await openSafetensors(scratch);
  assert.deepEqual([...file.tensors.keys()].sort(), [...expected.keys()].sort(), what);
  for (const [name, entry] of expected) {
    const { dtype, shape, begin, end } = file.tensors.get(name)!;
    assert.deepEqual([dtype, shape], [entry.dtype, entry.shape.map(Number)], what);
    assert(bytes.subarray(begin, end).equals(entry.bytes), what);
    if (/^B?F(16|32|64)$/.test(dtype)) assertSameFloats(file.readFloat32(name), secondDecoder(entry), what);
    else assert.throws(() => file.readFloat32(name), { name: 'UsageError' });
  }
  file.close();
  return 'accepted';
}

// ---- files of the Python library, and files for it ----

test("reads Python's file: every dtype, rank 0, zero size, hostile names", async () => {
  const file = await openSafetensors(path.join(fixtures, 'mixed.safetensors'));
  const expected = JSON.parse(fs.readFileSync(path.join(fixtures, 'mixed.json'), 'utf8'));
  assert.deepEqual([...file.tensors.keys()].sort(), Object.keys(expected.shapes).sort());
  for (const [name, shape] of Object.entries(expected.shapes))
    assert.deepEqual(file.tensors.get(name)!.shape, shape, name);
  for (const [name, bits] of Object.entries<number[]>(expected.float32Bits))
    assertSameFloats(file.readFloat32(name), new Float32Array(Uint32Array.from(bits).buffer), name);
  assert.deepEqual(
    [...file.metadata],
    [
      ['format', 'pt'],
      ['__proto__', 'text'],
    ],
  );
  assert.throws(() => file.readFloat32('i64'), /"i64" is I64; F32,F16,BF16,F64 can be read here/);
  assert.throws(() => file.readFloat32('i32'), /"i32" is I32/);
  assert.throws(() => file.readFloat32('toString'), /has no tensor "toString"/);
  file.close();
  assert.equal(await agree(fs.readFileSync(path.join(fixtures, 'mixed.safetensors')), 'mixed'), 'accepted');
});

test('decodes all 65,536 F16 and BF16 values as PyTorch does', async () => {
  const every = new Uint8Array(Uint16Array.from({ length: 65536 }, (_, i) => i ^ 0x8000).buffer);
  // printed by fixtures/make_safetensors.py
  const hashes = {
    F16: '8cc72c0b797bbe2abbad751e8b1aaa98a27df39ea77ace7a8200eb4b411da1d8',
    BF16: '62288939305d989d1206bf27693b93ad80577cc29108eafc7a345a9dd74329ac',
  };
  for (const [dtype, expected] of Object.entries(hashes)) {
    fs.writeFileSync(scratch, pack(`{"x":{"dtype":"${dtype}","shape":[65536],"data_offsets":[0,131072]}}`, every));
    const file = await openSafetensors(scratch);
    const values = file.readFloat32('x').map(x => (Number.isNaN(x) ? Number.NaN : x));
    file.close();
    assert.equal(crypto.createHash('sha256').update(new Uint8Array(values.buffer)).digest('hex'), expected, dtype);
  }
});

test('a large half tensor is converted piece by piece without a seam', async () => {
  const n = 2 ** 21 + 2 ** 20 + 5; // more than one 4 MiB piece
  for (const dtype of ['F16', 'BF16', 'F64']) {
    const bytes = Buffer.alloc((n * BITS[dtype]!) / 8);
    for (let i = 0; i + 8 <= bytes.length; i += 4) bytes.writeInt32LE((i * 2654435761) | 0, i);
    fs.writeFileSync(
      scratch,
      pack(`{"x":{"dtype":"${dtype}","shape":[${n}],"data_offsets":[0,${bytes.length}]}}`, bytes),
    );
    const file = await openSafetensors(scratch);
    assertSameFloats(file.readFloat32('x'), secondDecoder({ dtype, shape: [], bytes }), dtype);
    file.close();
  }
});

test('what is written reads back, and is what Python accepted', async () => {
  const tensors = [
    { name: 'w', shape: [2, 3], data: new Float32Array([1, -0, Number.NaN, 1e-45, 3e38, 0.1]) },
    { name: '__proto__', shape: [], data: new Float32Array([5]) },
    { name: 'none', shape: [0, 7], data: new Float32Array(0) },
    { name: 'late', shape: [1], data: async () => new Float32Array([8, 9]).subarray(1) },
  ];
  const hash = await writeSafetensors(scratch, tensors, { format: 'pt', step: '3' });
  const bytes = fs.readFileSync(scratch);
  assert.equal(crypto.createHash('sha256').update(bytes).digest('hex'), hash);
  // safetensors 0.8.0 loads the file with this hash and gives the same values
  assert.equal(hash, '50940bc2c1c9c974ef89b45eeee4150134932274278210a9d9497641b39937c6');
  assert.equal(bytes.readBigUInt64LE() % 8n, 0n);
  assert.equal(await agree(bytes, 'written'), 'accepted');
  fs.writeFileSync(scratch, bytes);
  const file = await openSafetensors(scratch);
  assert.deepEqual(
    [...file.metadata],
    [
      ['format', 'pt'],
      ['step', '3'],
    ],
  );
  assert.deepEqual(
    [...file.tensors.keys()],
    tensors.map(t => t.name),
  );
  assertSameFloats(file.readFloat32('w'), tensors[0]!.data as Float32Array, 'w');
  assert.deepEqual([...file.readFloat32('__proto__'), ...file.readFloat32('late')], [5, 9]);
  assert.equal(file.readFloat32('none').length, 0);
  file.close();
  assert.deepEqual(fs.readdirSync(folder), ['a.safetensors'], 'nothing is left beside');
});

test('a write that fails leaves the old file and nothing beside it', async () => {
  await writeSafetensors(scratch, [{ name: 'old', shape: [1], data: new Float32Array([1]) }]);
  const old = fs.readFileSync(scratch);
  const x = { name: 'x', shape: [2], data: new Float32Array(2) };
  const broken: [Parameters<typeof writeSafetensors>[1], RegExp][] = [
    [[x, x], /two tensors have the name x/],
    [[x, { ...x, name: '__metadata__' }], /two tensors have the name __metadata__/],
    [[x, { ...x, name: 'y', shape: [3] }], /the data of y is not of shape \[3\]/],
    [[x, { ...x, name: 'y', data: () => Promise.reject(new Error('device lost')) }], /device lost/],
  ];
  for (const [tensors, message] of broken) {
    await assert.rejects(writeSafetensors(scratch, tensors), message);
    assert(fs.readFileSync(scratch).equals(old));
    assert.deepEqual(fs.readdirSync(folder), ['a.safetensors']);
  }
  await assert.rejects(writeSafetensors(path.join(folder, 'gone', 'a.safetensors'), [x]), /ENOENT/);
});

// ---- files from strangers ----

const one = '{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}';
const entry = (fields: string) => `{"x":{${fields}}}`;
const nested = (depth: number) => `{"x":${'['.repeat(depth)}${']'.repeat(depth)}}`;

const accepted: [string, Buffer][] = [
  ['the smallest', pack('{}')],
  ['one tensor', pack(one, 4)],
  ['spaces after the header', pack(`${one}   `, 4)],
  ['white space inside', pack(one.replaceAll(':', ' :\n').replaceAll(',', '\t, '), 4)],
  ['rank 0', pack(entry('"dtype":"F32","shape":[],"data_offsets":[0,4]'), 4)],
  ['zero size', pack(entry('"dtype":"F32","shape":[3,0],"data_offsets":[0,0]'))],
  [
    'an empty tensor where another begins',
    pack(`${one.slice(0, -1)},"y":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}`, 4),
  ],
  ['fields in another order', pack(entry('"data_offsets":[0,2],"shape":[2],"dtype":"BOOL"'), 2)],
  ['empty metadata', pack('{"__metadata__":{}}')],
  ['metadata that is null', pack(`{"__metadata__":null,${one.slice(1)}`, 4)],
  [
    'the same key in two objects',
    pack('{"__metadata__":{"x":"dtype"},"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1),
  ],
  [
    'braces, quotes and numbers in strings',
    pack('{"__metadata__":{"a\\"}{:":"\\\\","b":"-1e5 \\" 2.0 {","c\\"":"}"}}'),
  ],
  ['an escaped name', pack(one.replace('"x"', '"\\u0078\\ud83d\\ude00"'), 4)],
];
for (const [what, bytes] of accepted)
  test(`accepts ${what}`, async () => assert.equal(await agree(bytes, what), 'accepted'));

const refused: [string, Buffer, RegExp][] = [
  ['an empty file', Buffer.alloc(0), /ends too early/],
  ['7 bytes', Buffer.alloc(7), /ends too early/],
  ['a header of no bytes', pack(''), /must start with '\{'/],
  ['a header beyond the file', pack(one, 4, one.length + 5), /at most 100 MB within the file's 66 are read/],
  ['a header of 2^63 bytes', pack(one, 4, 2n ** 63n), /header of 9223372036854776000 bytes/],
  ['a space before the header', pack(` ${one}`, 4), /must start with '\{'/],
  ['a byte-order mark', pack(`\ufeff${one}`, 4), /must start with '\{'/],
  ['a list as header', pack('[]'), /must start with '\{'/],
  ['UTF-8 that is cut', pack(Buffer.concat([Buffer.from('{"'), Buffer.from([0xc3]), Buffer.from('":{}}')])), /UTF-8/],
  ['a surrogate in UTF-8', pack(Buffer.from('7b22eda080223a7b7d7d', 'hex')), /UTF-8/],
  ['an overlong slash', pack(Buffer.from('7b22c0af223a7b7d7d', 'hex')), /UTF-8/],
  ['half a surrogate pair as escape', pack(one.replace('"x"', '"\\udc00"'), 4), /surrogate/],
  ['a zero byte after the header', pack(`${one}\0`, 4), /JSON/],
  ['a second header', pack(`${one}${one}`, 4), /JSON/],
  ['a trailing comma', pack(one.replace('}}', '},}'), 4), /JSON/],
  ['a comment', pack(`{/**/${one.slice(1)}`, 4), /JSON/],
  ['NaN as number', pack(one.replace('[1]', '[NaN]'), 4), /JSON/],
  ['a name that comes twice', pack(`${one.slice(0, -1)},${one.slice(1)}`, 4), /key "x" comes twice/],
  ['a name that comes twice, once escaped', pack(`${one.slice(0, -1)},"\\u0078":null}`, 4), /key "x" comes twice/],
  [
    'a field that comes twice',
    pack(entry('"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]'), 4),
    /"dtype" comes twice/,
  ],
  ['metadata that comes twice', pack('{"__metadata__":{},"__metadata__":{}}'), /comes twice/],
  ['metadata that is a list', pack('{"__metadata__":["a"]}'), /not an object of strings/],
  ['metadata that is a string', pack('{"__metadata__":"a"}'), /not an object of strings/],
  ['metadata that is false', pack('{"__metadata__":false}'), /not an object of strings/],
  ['metadata with null in it', pack('{"__metadata__":{"a":null}}'), /not an object of strings/],
  ['metadata with a number', pack('{"__metadata__":{"step":1}}'), /not an object of strings/],
  ['an entry that is null', pack('{"x":null}'), /dtype is none of/],
  ['an entry that is a list', pack('{"x":[]}'), /dtype is none of/],
  ['an entry that is text', pack('{"x":"dtype"}'), /dtype is none of/],
  ['fields behind __proto__', pack(entry(`"__proto__":${one.slice(5, -1)}`), 4), /dtype is none of/],
  ['an unknown dtype', pack(one.replace('F32', 'F31'), 4), /dtype is none of BOOL,U8/],
  ['a dtype that objects have', pack(one.replace('F32', 'constructor'), 4), /dtype is none of/],
  ['a dtype in a list', pack(one.replace('"F32"', '["F32"]'), 4), /dtype is none of/],
  ['a dtype with a toString', pack(one.replace('"F32"', '{"toString":"F32"}'), 4), /dtype is none of/],
  ['no shape', pack(entry('"dtype":"F32","data_offsets":[0,4]'), 4), /takes dtype, shape and two/],
  ['no offsets', pack(entry('"dtype":"F32","shape":[1]'), 4), /takes dtype, shape and two/],
  ['three offsets', pack(one.replace('[0,4]', '[0,4,4]'), 4), /takes dtype, shape and two/],
  ['an unknown field', pack(one.replace('"dtype"', '"strides":[1],"dtype"'), 4), /and nothing else/],
  ['a shape that is a number', pack(one.replace('[1]', '1'), 4), /whole numbers/],
  ['a shape of text', pack(one.replace('[1]', '["1"]'), 4), /whole numbers/],
  ['a negative size', pack(one.replace('[1]', '[-1]'), 4), /-1 is not a plain whole number/],
  ['a fraction', pack(one.replace('[1]', '[1.0]'), 4), /1\.0 is not a plain whole number/],
  ['an exponent', pack(one.replace('[1]', '[1e0]'), 4), /1e0 is not a plain whole number/],
  ['a size above 2^53', pack(one.replace('[1]', '[9007199254740993]'), 4), /whole numbers/],
  ['a product above 2^53', pack(one.replace('[1]', '[4294967296,4294967296]'), 4), /are not what F32 of shape/],
  [
    'a shape that does not fill the bytes',
    pack(one.replace('[1]', '[2]'), 4),
    /bytes 0 to 4 are not what F32 of shape \[2\] takes/,
  ],
  ['offsets the wrong way round', pack(one.replace('[0,4]', '[4,0]'), 4), /bytes 4 to 0/],
  ['a hole at the start', pack(one.replace('[0,4]', '[4,8]'), 8), /overlap or hole at byte 62/],
  ['a hole', pack(`${one.slice(0, -1)},"y":{"dtype":"U8","shape":[1],"data_offsets":[5,6]}}`, 6), /overlap or hole/],
  [
    'an overlap',
    pack(`${one.slice(0, -1)},"y":{"dtype":"U8","shape":[4],"data_offsets":[3,7]}}`, 7),
    /overlap or hole/,
  ],
  ['two tensors in the same place', pack(`${one.slice(0, -1)},"y":${one.slice(5)}`, 4), /overlap or hole/],
  [
    'an empty tensor inside another',
    pack(`${one.slice(0, -1)},"y":{"dtype":"U8","shape":[0],"data_offsets":[2,2]}}`, 4),
    /overlap or hole/,
  ],
  ['a trailing byte', pack(one, 5), /tensors end at byte 66, not with the file at 67/],
  ['a missing byte', pack(one, 3), /tensors end at byte 66, not with the file at 65/],
  [
    'control characters in a name',
    pack(one.replace('"x"', '"\\u001b[31m\\n\\u202e\\u2028\\u009b"').replace('[1]', '[2]'), 4),
    /tensor "\?\[31m\?\?\?\?"/,
  ],
  ['lists 100,000 deep', pack(nested(1e5)), /./],
  ['lists 1,000,000 deep', pack(nested(1e6)), /./],
  ['objects 100,000 deep', pack(`${'{"x":'.repeat(1e5)}1${'}'.repeat(1e5)}`), /./],
  ['a string of 5,000,000 escapes', pack(`{"${'\\n'.repeat(5e6)}":0}`), /./],
  ['a string of 20,000,000 letters', pack(`{"${'a'.repeat(2e7)}":0}`), /dtype is none of/],
];
for (const [what, bytes, message] of refused)
  test(`refuses ${what}`, async () => assert.match(await refusal(bytes), message));

// What is there instead of the file, as it comes from clones, browsers, mirrors and old checkpoints.
const standIns: [string, string | Buffer, RegExp][] = [
  [
    'a Git LFS pointer',
    `version https://git-lfs.github.com/spec/v1\noid sha256:${'0'.repeat(64)}\nsize 1064960\n`,
    /is a Git LFS pointer, not the file: run "git lfs pull"/,
  ],
  ['an HTML page', '<!DOCTYPE html>\n<html lang="en">…', /is an HTML page, not the file: download/],
  ['a page after a blank line and a byte-order mark', '\ufeff\n  <html>', /is an HTML page/],
  ["a storage's answer", '<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', /is an XML answer/],
  ['a JSON error', '{"error":"Repository not found"}', /is a server's error message/],
  ['a text error', 'Entry not found', /is a server's error message/],
  ['a git-annex pointer', '/annex/objects/SHA256E-s5--00.safetensors\n', /git-annex pointer.*"git annex get"/],
  ['a zipped pickle', 'PK\u0003\u0004\0\0\0\0archive/data.pkl', /is a zipped PyTorch pickle: convert/],
  ['a bare pickle', Buffer.from('80028a0a6cfc9c46f9206aa85019', 'hex'), /is a PyTorch pickle/],
  ['GGUF', 'GGUF\u0003\0\0\0', /is a GGUF file/],
  ['gzip', Buffer.from('1f8b0808000000000003', 'hex'), /is compressed with gzip/],
];
for (const [what, bytes, message] of standIns)
  test(`names ${what}`, async () => assert.match(await refusal(Buffer.from(bytes as string)), message));

test('a header whose length looks like gzip is no stand-in', async () => {
  const padded = one.padEnd(0x00088b1f); // the length begins with the bytes 1f 8b 08 00
  assert.equal(await agree(pack(padded, 4), 'padded'), 'accepted');
});

test('refuses a header above 100 MB, a folder and a missing file', async () => {
  fs.writeFileSync(scratch, pack('{', 0, 100_000_001));
  fs.truncateSync(scratch, 300e6); // sparse
  await assert.rejects(openSafetensors(scratch), /header of 100000001 bytes; at most 100 MB/);
  for (const missing of [folder, path.join(folder, 'gone'), ...(fs.existsSync('/dev/zero') ? ['/dev/zero'] : [])])
    await assert.rejects(openSafetensors(missing), /is not a file; a \.safetensors file is expected here/);
});

test('reads a tensor beyond 4 GiB by range', async () => {
  const big = 2 ** 32 + 8;
  const header = `{"big":{"dtype":"U8","shape":[${big}],"data_offsets":[0,${big}]},"x":{"dtype":"F32","shape":[1],"data_offsets":[${big},${big + 4}]}}`;
  const fd = fs.openSync(scratch, 'w');
  fs.writeSync(fd, pack(header));
  fs.writeSync(fd, new Float32Array([6.5]), 0, 4, 8 + header.length + big); // the rest is a hole of the file system
  fs.closeSync(fd);
  const file = await openSafetensors(scratch);
  assert.deepEqual([...file.readFloat32('x')], [6.5]);
  file.close();
});

test('refuses a tiny file cut at every length, and a file that shrinks while it is open', async () => {
  const tiny = fs.readFileSync(path.join(fixtures, 'tiny.safetensors'));
  for (let length = 0; length < tiny.length; length++)
    assert.notEqual(await refusal(tiny.subarray(0, length)), 'accepted', `${length} bytes`);
  assert.equal(await agree(tiny, 'whole'), 'accepted');
  const file = await openSafetensors(scratch);
  fs.truncateSync(scratch, tiny.length - 1);
  assert.throws(() => [...file.tensors.keys()].map(name => file.readFloat32(name)), /ends too early/);
  file.close();
});

test('no mutated file crashes the reader or gives another tensor than the second reader finds', async t => {
  const runs = process.env.NANO_LONG_TESTS === '1' ? 40_000 : 2_000;
  let state = 12345;
  const random = (n: number) => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0; // a linear congruential generator: the upper bits are good
    return Math.floor((state / 2 ** 32) * n);
  };
  const pick = <T>(list: readonly T[]) => list[random(list.length)]!;
  const originals = ['mixed', 'tiny'].map(name => fs.readFileSync(path.join(fixtures, `${name}.safetensors`)));
  const numbers =
    '0 1 2 3 4 5 8 16 007 -0 -1 1.0 4e0 2147483648 4294967296 9007199254740991 9007199254740993 18446744073709551616 ""'.split(
      ' ',
    );

  const onHeader: ((header: string) => string)[] = [
    h => replaceOne(h, /\d+/g, () => pick(numbers)), // a size or an offset
    h => replaceOne(h, /\d+/g, n => String(Math.max(0, Number(n) + random(9) - 4))),
    h => replaceOne(h, /(?<=[[,])\d+/g, n => pick([`${n}.0`, `${n}e0`, `-${n}`, `0${n}`, `"${n}"`, ` ${n}\n`])),
    h => replaceOne(h, /"(BOOL|[BUIF]+\d+)"/g, () => `"${pick([...Object.keys(BITS), 'F4', 'f32', '', '__proto__'])}"`),
    h => replaceOne(h, /\[[\d,]*\]/g, () => pick(['[]', '[0]', '[1,1,1,1]', '[0,4]', '[[1]]', '{}', 'null', '["1"]'])),
    h => replaceOne(h, /(?<=\[)[\d,]+(?=\])/g, list => list.split(',').reverse().join()),
    h => replaceOne(h, /(?<=\[)[\d,]*(?=\])/g, list => [...list.split(',').filter(Boolean), '1'].join()),
    h => replaceOne(h, /[{}[\],:"]/g, () => pick([...'{}[],:" ', '\\', ''])),
    h => replaceOne(h, /[[\]{},:]/g, c => pick([' ', '\n', '\t\r', '\0', '\v', '\u00a0']) + c), // the first three are fine
    h => replaceOne(h, /"[a-z0-9_]+":\{"dtype".*?\]\}/g, e => `${e},${e}`), // the same entry twice
    h => replaceOne(h, /"[a-z0-9_]+":\{"dtype".*?\]\},/g, () => ''), // one fewer: a hole
    h =>
      replaceOne(h, /"(dtype|shape|data_offsets)"/g, () => pick(['"dtype"', '"shape"', '"data_offsets"', '"extra"'])),
    h =>
      replaceOne(h, /[a-z]/g, c => pick([c.toUpperCase(), `\\u00${c.charCodeAt(0).toString(16)}`, '\\ud800', '\\x'])),
    h => replaceOne(h, /"[a-z0-9_]+"(?=:\{"dtype")/g, () => pick(['"__proto__"', '"__metadata__"', '"f32"', '"new"'])),
    h => h + pick([' ', '   ', '\n', '\0', '{}', ',', ' }']),
    h => pick([' ', '\n', '\ufeff', '[', '']) + h,
  ];
  function replaceOne(header: string, pattern: RegExp, by: (match: string) => string): string {
    const matches = [...header.matchAll(pattern)];
    if (!matches.length) return header;
    const m = pick(matches);
    return header.slice(0, m.index) + by(m[0]) + header.slice(m.index + m[0].length);
  }
  const onBytes: ((bytes: Buffer) => Buffer)[] = [
    b => setByte(b, random(b.length), 1 << random(8)),
    b => setByte(b, random(8), 1 << random(8)),
    b => setByte(b, 8 + random(Number(b.readBigUInt64LE())), 1 << random(8)),
    b => b.subarray(0, random(b.length)),
    b => Buffer.concat([b, Buffer.alloc(1 + random(8), random(256))]),
    b => {
      const [from, n] = [random(b.length), random(9)];
      return Buffer.concat([
        b.subarray(0, from),
        pick([Buffer.alloc(0), b.subarray(random(b.length))]).subarray(0, n),
        b.subarray(from + n),
      ]);
    },
  ];
  function setByte(bytes: Buffer, at: number, flip: number): Buffer {
    const copy = Buffer.from(bytes);
    if (at < copy.length) copy[at]! ^= flip;
    return copy;
  }

  const counts = { accepted: 0, refused: 0 };
  for (let run = 0; run < runs; run++) {
    const original = pick(originals);
    let bytes: Buffer = original;
    for (let n = random(2) && random(3); n >= 0; n--) {
      const headerBytes = bytes.length >= 8 ? Number(bytes.readBigUInt64LE()) : Number.POSITIVE_INFINITY;
      if (headerBytes > bytes.length - 8) break;
      if (random(3)) {
        const data = bytes.subarray(8 + headerBytes);
        bytes = pack(pick(onHeader)(bytes.subarray(8, 8 + headerBytes).toString()), data);
      } else bytes = pick(onBytes)(bytes);
    }
    counts[await agree(bytes, `run ${run}: ${bytes.toString('latin1')}`)]++;
  }
  t.diagnostic(`${counts.accepted} accepted, ${counts.refused} refused`);
  assert(counts.accepted > runs / 20 && counts.refused > runs / 2, 'the mutations are too mild or too wild');
});
