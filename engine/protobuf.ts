/**
 * The few parts of protobuf that a graph needs, without a library: a message is a row of fields, each a tag (field number
 * and kind of value) and a value.
 */
export const varint = (value: number | bigint): Buffer => {
  const out: number[] = [];
  let rest = BigInt.asUintN(64, BigInt(value)); // a negative number takes ten bytes
  for (; rest > 127n; rest >>= 7n) out.push(Number(rest & 127n) | 128);
  return Buffer.from([...out, Number(rest)]);
};
export const int = (field: number, value: number | bigint) => Buffer.concat([varint(field << 3), varint(value)]);
export const float = (field: number, value: number) =>
  Buffer.concat([varint((field << 3) | 5), Buffer.from(Float32Array.of(value).buffer)]);
export const message = (field: number, ...parts: (string | Uint8Array)[]) => {
  const body = Buffer.concat(parts.map(part => (typeof part === 'string' ? Buffer.from(part) : part)));
  return Buffer.concat([varint((field << 3) | 2), varint(body.length), body]);
};
