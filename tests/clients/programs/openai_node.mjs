// openai, OpenAI's JavaScript library.
import {
  BASE, CHAT, EMBED, IMAGES, PIXEL, PLACE, QUESTION, TEXTS, TOOLS, aboutParis, alike, ended, refused, run, sees, yes,
} from './common.mjs'

const { default: OpenAI } = await import(`${process.env.NODE_MODULES}/openai/index.mjs`)
const client = new OpenAI({ baseURL: `${BASE}/v1`, apiKey: 'none', maxRetries: 0 })
const messages = [{ role: 'user', content: QUESTION }]
const few = { max_tokens: 24, temperature: 0 }

await run('openai', {
  async list() {
    const found = []
    for await (const model of client.models.list()) found.push(model.id)
    yes(found.includes(CHAT), 'the model is not in the list')
  },
  async chat() {
    aboutParis((await client.chat.completions.create({ model: CHAT, messages, ...few })).choices[0].message.content)
  },
  async responses() {
    aboutParis((await client.responses.create({ model: CHAT, input: QUESTION, max_output_tokens: 24, temperature: 0 })).output_text)
  },
  async stream() {
    let text = ''
    const events = await client.chat.completions.create({ model: CHAT, messages, ...few, stream: true })
    for await (const chunk of events) text += chunk.choices[0]?.delta.content ?? ''
    aboutParis(text)
  },
  async tools() {
    const answer = await client.chat.completions.create({
      model: TOOLS, messages: [{ role: 'user', content: 'Weather in Paris?' }], max_tokens: 1500, temperature: 1,
      tools: [{ type: 'function', function: { name: 'weather', strict: true, parameters: PLACE } }], tool_choice: { type: 'function', function: { name: 'weather' } },
    })
    yes(JSON.parse(answer.choices[0].message.tool_calls[0].function.arguments).place === 'Paris', 'no call of the tool')
  },
  async images() {
    const url = `data:image/png;base64,${PIXEL}`
    const content = [{ type: 'text', text: 'What is it?' }, { type: 'image_url', image_url: { url } }]
    const answer = await client.chat.completions.create({ model: IMAGES, messages: [{ role: 'user', content }] })
    sees(answer.choices[0].message.content)
  },
  async embeddings() {
    alike((await client.embeddings.create({ model: EMBED, input: TEXTS })).data.map((each) => each.embedding))
  },
  async cancel() {
    const events = await client.chat.completions.create({ model: CHAT, messages, max_tokens: 4000, stream: true })
    for await (const _ of events) break
    await ended()
  },
  errors: () => refused(() => client.chat.completions.create({ model: 'nobody', messages }), 404, 'nobody'),
})
