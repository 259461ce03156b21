/**
 * The bytes of a TensorFlow SavedModel: the few protobuf messages that a graph needs. The numbers are those in
 * TensorFlow's .proto files (graph, node_def, attr_value, tensor, tensor_shape, meta_graph, saved_model).
 */

import { float, int, message } from './protobuf.ts';
import type { Numbers } from './record.ts';

/** A node; an input is 'name', 'name:1' for a second output, or '^name' to only run after it. */
export interface Node {
  name: string;
  op: string;
  inputs: string[];
  attrs: Attr[];
}
/** An attribute as tfjs-node's binding takes it: `type` is one of `AttrType`, `value` one of it or a list. */
export interface Attr {
  name: string;
  type: number;
  value: unknown;
}
/** TF_AttrType as the binding counts it; `tensor` is ours: a TensorProto in base64. */
export const AttrType = { string: 0, int: 1, float: 2, bool: 3, type: 4, shape: 5, tensor: -1 } as const;
/** TensorFlow's DataType by TFJS's name. */
export const DataType = { float32: 1, int32: 3, bool: 10 } as Record<string, number>;

const GRAPH_VERSION = 1087; // TensorFlow 2.9's; later ones read it too
const MAX_BYTES = 2 ** 31 - 2 ** 20; // protobuf's limit, and room for what surrounds the nodes

const shapeFields = (shape: number[]) => shape.map(size => message(2, int(1, size)));

function attrValue(type: number, value: unknown): Buffer {
  // a list repeats the same fields one level down
  if (Array.isArray(value) && type !== AttrType.shape) {
    return message(1, ...value.map(item => attrValue(type, item)));
  }
  if (type === AttrType.string) return message(2, value as string);
  if (type === AttrType.int) return int(3, value as number);
  if (type === AttrType.float) return float(4, value as number);
  if (type === AttrType.bool) return int(5, Number(value));
  if (type === AttrType.type) return int(6, value as number);
  if (type === AttrType.shape) return message(7, ...shapeFields(value as number[]));
  if (type === AttrType.tensor) return message(8, Buffer.from(value as string, 'base64'));
  throw new Error(`cannot write an attribute of type ${type}`);
}

const nodeDef = ({ name, op, inputs, attrs }: Node): Buffer =>
  message(
    1,
    message(1, name),
    message(2, op),
    ...inputs.map(input => message(3, input)),
    ...attrs.map(attr => message(5, message(1, attr.name), message(2, attrValue(attr.type, attr.value)))),
  );

/** The content of saved_model.pb, with the tag 'serve'. */
export function savedModel(nodes: Node[]): Buffer {
  const defs = nodes.map(nodeDef);
  const size = defs.reduce((sum, def) => sum + def.length, 0);
  if (size > MAX_BYTES) throw new Error(`the graph takes ${size} bytes, TensorFlow reads at most 2 GiB`);
  const graph = message(2, ...defs, message(4, int(1, GRAPH_VERSION)));
  return Buffer.concat([int(1, 1), message(2, message(1, message(4, 'serve')), graph)]);
}

/** The attributes of a Const node; a tensor of one repeated number (tf.zeros) is stored as that number. */
export function constAttrs(shape: number[], dtype: number, values: Numbers): Attr[] {
  const raw = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
  const repeated = dtype === DataType.float32 && values.length > 1 && values.every(x => Object.is(x, values[0]));
  const data = repeated ? message(5, raw.subarray(0, 4)) : message(4, raw);
  const tensor = Buffer.concat([int(1, dtype), message(2, ...shapeFields(shape)), data]);
  return [
    { name: 'dtype', type: AttrType.type, value: dtype },
    { name: 'value', type: AttrType.tensor, value: tensor.toString('base64') },
  ];
}
