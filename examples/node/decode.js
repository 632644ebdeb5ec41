// Reads the wire format: a zero byte, four bytes of schema id, then Avro as the schema of that id wrote it.
import { readFileSync } from 'node:fs'
import avro from 'avsc'

// Avro's long has 64 bits, a JavaScript number 53: read longs as BigInt.
const long = avro.types.LongType.__with({
  fromBuffer: (buffer) => buffer.readBigInt64LE(),
  toBuffer: (value) => { const buffer = Buffer.alloc(8); buffer.writeBigInt64LE(value); return buffer },
  fromJSON: BigInt,
  toJSON: String,
  isValid: (value) => typeof value === 'bigint',
  compare: (a, b) => (a < b ? -1 : a > b ? 1 : 0),
})
const parse = (schema) => avro.Type.forSchema(schema, { registry: { long }, wrapUnions: false })

/** Return an async function from a record's value to an event, with the fields of the schema in `file`. */
export function decoder(registryUrl, file) {
  const ours = parse(JSON.parse(readFileSync(file, 'utf8')))
  const resolvers = new Map() // an id's schema never changes

  return async (value) => {
    if (value[0] !== 0) throw new Error('a value does not begin with a zero byte and a schema id')
    const id = value.readUInt32BE(1)
    if (!resolvers.has(id)) {
      const answer = await fetch(`${registryUrl}/schemas/ids/${id}`, { signal: AbortSignal.timeout(5000) })
      if (!answer.ok) throw new Error(`schema id ${id}: the registry answers HTTP ${answer.status}`)
      const theirs = parse(JSON.parse((await answer.json()).schema))
      resolvers.set(id, ours.createResolver(theirs)) // whatever the writer's version: our fields
    }
    return ours.fromBuffer(value.subarray(5), resolvers.get(id))
  }
}
