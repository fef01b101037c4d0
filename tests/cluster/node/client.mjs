// What a Node program does through the tunnel, with the modules http, https and http2.
//
//	node client.mjs HTTP_HOST:PORT GRPC_HOST:PORT CERTIFICATE
import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import http from 'node:http'
import http2 from 'node:http2'
import https from 'node:https'

const [web, rpc, certificate] = process.argv.slice(2)
const ca = readFileSync(certificate)
const pieces = Array.from({ length: 1000 }, (_, i) => `piece ${i} of what is sent; `)
const sha256 = (data) => createHash('sha256').update(data).digest('hex')

async function read(stream) {
  const chunks = []
  for await (const chunk of stream) chunks.push(chunk)
  return Buffer.concat(chunks)
}

// One exchange over HTTP/1.1.
async function exchange1(base, path, { method = 'GET', body = [] } = {}) {
  const module = base.startsWith('https:') ? https : http
  const request = module.request(base + path, { method, ca, headers: { te: 'trailers' } })
  for (const piece of body) request.write(piece)
  request.end()
  const [response] = await once(request, 'response')
  const data = await read(response)
  assert.equal(response.httpVersion, '1.1')
  return { status: response.statusCode, data, trailers: response.trailers }
}

// One exchange over HTTP/2.
async function exchange2(session, path, { method = 'GET', body = [], headers = {} } = {}) {
  const stream = session.request({ ':method': method, ':path': path, te: 'trailers', ...headers })
  let trailers = {}
  stream.on('trailers', (fields) => (trailers = fields))
  const head = once(stream, 'response')
  for (const piece of body) stream.write(piece)
  stream.end()
  const [fields] = await head
  return { status: fields[':status'], data: await read(stream), trailers }
}

async function check(exchange) {
  const got = await exchange('/hello?from=node')
  assert.equal(got.status, 200)
  assert.equal(JSON.parse(got.data).target, '/hello?from=node')

  const sent = await exchange('/upload', { method: 'POST', body: pieces })
  assert.equal(sent.status, 200)
  assert.equal(JSON.parse(sent.data).sha256, sha256(pieces.join('')))

  const trailed = await exchange('/trailers')
  assert.equal(trailed.trailers['x-body-sha256'], sha256(trailed.data))
}

// A unary call by hand (PROTOCOL-HTTP2.md): response_size 3 in, payload.body of three zeros out.
async function call(session) {
  const answer = await exchange2(session, '/grpc.testing.TestService/UnaryCall', {
    method: 'POST',
    headers: { 'content-type': 'application/grpc' },
    body: [Buffer.from([0, 0, 0, 0, 2, 0x10, 3])],
  })
  assert.equal(answer.trailers['grpc-status'], '0')
  assert.deepEqual([...answer.data], [0, 0, 0, 0, 7, 0x0a, 5, 0x12, 3, 0, 0, 0])
}

async function withSession(base, use) {
  const session = http2.connect(base, { ca })
  try {
    await use(session)
  } finally {
    session.close()
  }
}

for (const scheme of ['http', 'https']) {
  await check((...request) => exchange1(`${scheme}://${web}`, ...request))
  console.log('HTTP/1.1,', scheme)
  await withSession(`${scheme}://${web}`, (session) => check((...request) => exchange2(session, ...request)))
  console.log('HTTP/2,', scheme)
  await withSession(`${scheme}://${rpc}`, call)
  console.log('gRPC,', scheme)
}
const untrusting = once(https.get(`https://${web}/hello`), 'response')
await assert.rejects(untrusting, /self-signed certificate|unable to (get|verify)/)
