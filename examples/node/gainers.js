// The day's top gainers, live, and after each poll whether nothing changed or no data arrived.
import { randomUUID } from 'node:crypto'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import kafkajs from 'kafkajs'
import lz4 from 'lz4js'
import { decoder } from './decode.js'

const { CompressionCodecs, CompressionTypes, Kafka, logLevel } = kafkajs
// The topics are compressed with LZ4, for which KafkaJS has no codec of its own.
CompressionCodecs[CompressionTypes.LZ4] = () => ({
  compress: async (encoder) => Buffer.from(lz4.compress(encoder.buffer)),
  decompress: async (buffer) => Buffer.from(lz4.decompress(buffer)),
})

const { values: options } = parseArgs({
  options: {
    'bootstrap-servers': { type: 'string', default: '127.0.0.1:9092' },
    'registry-url': { type: 'string', default: 'http://127.0.0.1:8081' },
    'topic-prefix': { type: 'string', default: 'bourse' },
    schemas: { type: 'string', default: fileURLToPath(new URL('../../schemas/bourse_schemas/avro', import.meta.url)) },
    'exit-at-end': { type: 'boolean', default: false },
  },
})
const candles = `${options['topic-prefix']}.candles`
const polls = `${options['topic-prefix']}.polls`
const decode = {
  [candles]: decoder(options['registry-url'], `${options.schemas}/Candle.avsc`),
  [polls]: decoder(options['registry-url'], `${options.schemas}/PollMarker.avsc`),
}
const kafka = new Kafka({ brokers: options['bootstrap-servers'].split(','), logLevel: logLevel.NOTHING, retry: { retries: 2 } })

const table = new Map() // the running candle of each instrument
let silence // a timer: fires if no marker arrives

async function main() {
  const admin = kafka.admin()
  await admin.connect()
  const behind = new Map() // partition -> its end; of those that were not read to that end
  for (const topic of [candles, polls]) {
    for (const { partition, low, high } of await admin.fetchTopicOffsets(topic)) {
      if (high !== low) behind.set(`${topic}-${partition}`, BigInt(high))
    }
  }
  await admin.disconnect()

  // KafkaJS cannot read without a group. A new one reads all there is.
  const consumer = kafka.consumer({ groupId: `bourse-example-${randomUUID()}` }) // reads committed records only
  await consumer.connect()
  await consumer.subscribe({ topics: [candles, polls], fromBeginning: true })
  const ended = new Promise((resolve, reject) => {
    if (behind.size === 0 && options['exit-at-end']) resolve() // there is nothing to read
    consumer.on(consumer.events.CRASH, ({ payload }) => reject(payload.error))
    consumer.on(consumer.events.END_BATCH_PROCESS, ({ payload: { topic, partition, lastOffset } }) => {
      const end = behind.get(`${topic}-${partition}`)
      if (end === undefined || BigInt(lastOffset) + 1n < end) return
      behind.delete(`${topic}-${partition}`)
      if (behind.size > 0) return
      showGainers() // all that was there has been read
      if (options['exit-at-end']) resolve()
    })
  })
  await consumer.run({
    eachMessage: async ({ topic, message }) => {
      const event = message.value && (await decode[topic](message.value))
      if (topic === polls) showPoll(event, behind.size === 0)
      else if (!event) table.delete(message.key.toString()) // an empty candle: the instrument was removed
      else if (isNewer(event, table.get(event.instrument))) table.set(event.instrument, event)
    },
  })
  await ended
  await consumer.disconnect()
}

// A topic that got more partitions has an older candle in the instrument's partition of before.
const isNewer = (candle, known) =>
  !known || candle.trading_day > known.trading_day || (candle.trading_day === known.trading_day && candle.sequence > known.sequence)
const time = (millis) => new Date(Number(millis)).toISOString()

function showPoll(marker, live) {
  const words = {
    PUBLISHED: `${marker.opened + marker.traded + marker.revised + marker.cancelled} changes`,
    UNCHANGED: 'no change: the exchange answered, nothing moved',
  }
  console.log(time(marker.requested_at), words[marker.outcome] ?? `no data: ${marker.error_message ?? marker.outcome}`)
  clearTimeout(silence)
  if (live && marker.next_poll_at !== null && !marker.simulated) {
    const due = Number(marker.next_poll_at) + 120_000 - Date.now()
    silence = setTimeout(() => console.log('no data: the producer is silent'), Math.max(0, due))
  }
  if (live) showGainers()
}

function showGainers() {
  // An instrument that was not traded today still has an older candle.
  const today = Math.max(...[...table.values()].map((candle) => candle.trading_day))
  const gainers = [...table.values()]
    .filter((candle) => candle.trading_day === today && candle.last_price !== null && candle.previous_close)
    // Prices are far below 2^53; value and volume are not: add those up as BigInt.
    .map((candle) => ({ ...candle, change: (100 * Number(candle.last_price - candle.previous_close)) / Number(candle.previous_close) }))
    .sort((a, b) => b.change - a.change || (a.instrument < b.instrument ? -1 : 1))
  for (const { symbol, last_price, change } of gainers.slice(0, 10)) console.log(`${symbol}\t${last_price}\t${change}`)
  console.log(`value of the day\t${gainers.reduce((sum, candle) => sum + candle.value, 0n)}`)
}

main().then(
  () => process.exit(0),
  (error) => {
    console.error(`error: ${error.message} (Kafka at ${options['bootstrap-servers']}, registry at ${options['registry-url']})`)
    process.exit(1)
  },
)
