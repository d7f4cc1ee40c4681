import static java.nio.charset.StandardCharsets.UTF_8;

import com.fasterxml.jackson.core.JsonFactory;
import com.fasterxml.jackson.core.JsonGenerator;
import com.fasterxml.jackson.core.JsonParser;
import com.fasterxml.jackson.core.JsonToken;
import com.fasterxml.jackson.core.util.ByteArrayBuilder;
import java.io.IOException;
import java.io.InputStream;
import java.io.UncheckedIOException;
import java.nio.ByteBuffer;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Map;
import java.util.Properties;
import net.jpountz.xxhash.XXHash64;
import net.jpountz.xxhash.XXHashFactory;
import org.apache.kafka.common.serialization.ByteArrayDeserializer;
import org.apache.kafka.common.serialization.ByteArraySerializer;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.Topology;
import org.apache.kafka.streams.errors.StreamsUncaughtExceptionHandler.StreamThreadExceptionResponse;
import org.apache.kafka.streams.processor.api.Processor;
import org.apache.kafka.streams.processor.api.ProcessorContext;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.state.KeyValueBytesStoreSupplier;
import org.apache.kafka.streams.state.KeyValueStore;
import org.apache.kafka.streams.state.Stores;

/**
 * Prepaid balances in Kafka Streams, for a comparison on one machine: price by the longest prefix,
 * each id once, debit, one ledger entry an event, a recharge request below the trigger, all of it
 * exactly once. Nothing else of what Credits does.
 *
 * <p>Arguments: a properties file, then name=value. Names that begin with "work." are read here,
 * all others are Kafka's.
 */
public final class UsageLedger {
    private static final String SEEN = "seen";
    private static final String BALANCES = "balances";
    private static final String ENTRIES = "entries";
    private static final String REQUESTS = "requests";

    public static void main(String[] arguments) throws IOException {
        Properties properties = new Properties();
        try (InputStream file = Files.newInputStream(Path.of(arguments[0]))) {
            properties.load(file);
        }
        for (String argument : Arrays.asList(arguments).subList(1, arguments.length)) {
            int at = argument.indexOf('=');
            properties.setProperty(argument.substring(0, at), argument.substring(at + 1));
        }
        KafkaStreams streams = new KafkaStreams(topology(properties), properties);
        streams.setUncaughtExceptionHandler(error -> {
            error.printStackTrace();
            // Not exit(): the shutdown hook would wait for the thread that asks for it.
            Runtime.getRuntime().halt(1);
            return StreamThreadExceptionResponse.SHUTDOWN_CLIENT;
        });
        Runtime.getRuntime()
                .addShutdownHook(new Thread(() -> streams.close(Duration.ofSeconds(15))));
        streams.start();
    }

    private static Topology topology(Properties work) throws IOException {
        Deck deck = Deck.read(Path.of(work.getProperty("work.deck")));
        long opening = Long.parseLong(work.getProperty("work.opening"));
        long trigger = Long.parseLong(work.getProperty("work.trigger"));
        ByteArrayDeserializer in = new ByteArrayDeserializer();
        ByteArraySerializer out = new ByteArraySerializer();
        Topology topology = new Topology();
        topology.addSource("usage", in, in, work.getProperty("work.usage").split(","));
        topology.addProcessor("charging", () -> new Charging(deck, opening, trigger), "usage");
        topology.addSink(ENTRIES, work.getProperty("work.entries"), out, out, "charging");
        topology.addSink(REQUESTS, work.getProperty("work.requests"), out, out, "charging");
        // RocksDB takes more CPU an event than memory does.
        boolean inMemory = work.getProperty("work.state").equals("memory");
        // An id is written once, so that a cache before its store would only cost.
        topology.addStateStore(
                Stores.keyValueStoreBuilder(
                                store(SEEN, inMemory),
                                Serdes.ByteArray(),
                                Serdes.ByteArray())
                        .withCachingDisabled()
                        .withLoggingEnabled(Map.of()),
                "charging");
        // A balance changes often: the cache writes it to the changelog once a commit.
        topology.addStateStore(
                Stores.keyValueStoreBuilder(
                                store(BALANCES, inMemory),
                                Serdes.ByteArray(),
                                Serdes.ByteArray())
                        .withCachingEnabled()
                        .withLoggingEnabled(Map.of()),
                "charging");
        return topology;
    }

    private static KeyValueBytesStoreSupplier store(String name, boolean inMemory) {
        return inMemory ? Stores.inMemoryKeyValueStore(name) : Stores.persistentKeyValueStore(name);
    }

    /** What is done with a usage event. One instance a partition, used by one thread. */
    private static final class Charging implements Processor<byte[], byte[], byte[], byte[]> {
        private static final byte[] THERE = {};
        private static final XXHash64 HASH = XXHashFactory.fastestInstance().hash64();
        private static final JsonFactory JSON = new JsonFactory();

        private final Deck deck;
        private final long opening;
        private final long trigger;
        private final ByteArrayBuilder buffer = new ByteArrayBuilder(512);
        private ProcessorContext<byte[], byte[]> context;
        private KeyValueStore<byte[], byte[]> seen;
        private KeyValueStore<byte[], byte[]> balances;

        // The event in hand.
        private String eventId;
        private String source;
        private String callee;
        private int durationS;

        Charging(Deck deck, long opening, long trigger) {
            this.deck = deck;
            this.opening = opening;
            this.trigger = trigger;
        }

        @Override
        public void init(ProcessorContext<byte[], byte[]> given) {
            context = given;
            seen = given.getStateStore(SEEN);
            balances = given.getStateStore(BALANCES);
        }

        @Override
        public void process(Record<byte[], byte[]> record) {
            try {
                decode(record.value());
                byte[] id = fingerprint();
                if (seen.get(id) != null) {
                    return;
                }
                seen.put(id, THERE);
                book(record);
            } catch (IOException error) {
                throw new UncheckedIOException(error);
            }
        }

        private void decode(byte[] value) throws IOException {
            eventId = null;
            source = null;
            callee = null;
            durationS = -1;
            try (JsonParser parser = JSON.createParser(value)) {
                parser.nextToken();
                String name;
                while ((name = parser.nextFieldName()) != null) {
                    switch (name) {
                        case "event_id" -> eventId = parser.nextTextValue();
                        case "source" -> source = parser.nextTextValue();
                        case "callee" -> callee = parser.nextTextValue();
                        case "duration_s" -> durationS = parser.nextIntValue(-1);
                        default -> {
                            parser.nextToken();
                            parser.skipChildren();
                        }
                    }
                }
                if (parser.currentToken() != JsonToken.END_OBJECT
                        || eventId == null
                        || source == null
                        || callee == null
                        || durationS < 0) {
                    throw new IOException("no usage event: " + new String(value, UTF_8));
                }
            }
        }

        private byte[] fingerprint() {
            byte[] name = (source + "\0" + eventId).getBytes(UTF_8);
            return ByteBuffer.allocate(8).putLong(HASH.hash(name, 0, name.length, 0)).array();
        }

        private void book(Record<byte[], byte[]> record) throws IOException {
            Rate rate = deck.find(callee);
            if (rate == null) {
                throw new IOException("no rate for " + callee);
            }
            int billedS = rate.billedSeconds(durationS);
            long nanos = rate.price(billedS);
            byte[] row = balances.get(record.key());
            long balance = opening;
            byte requested = 0;
            if (row != null) {
                ByteBuffer read = ByteBuffer.wrap(row);
                balance = read.getLong();
                requested = read.get();
            }
            balance -= nanos;
            boolean requests = requested == 0 && balance < trigger;
            if (requests) {
                requested = 1;
            }
            byte[] changed = ByteBuffer.allocate(9).putLong(balance).put(requested).array();
            balances.put(record.key(), changed);
            String tenant = new String(record.key(), UTF_8);
            context.forward(record.withValue(entry(tenant, rate, billedS, nanos, balance)), ENTRIES);
            if (requests) {
                context.forward(record.withValue(request(tenant, balance)), REQUESTS);
            }
        }

        private byte[] entry(String tenant, Rate rate, int billedS, long nanos, long balance)
                throws IOException {
            buffer.reset();
            try (JsonGenerator json = JSON.createGenerator(buffer)) {
                json.writeStartObject();
                json.writeStringField("kind", "charge");
                json.writeStringField("tenant_id", tenant);
                json.writeStringField("source", source);
                json.writeStringField("event_id", eventId);
                json.writeStringField("prefix", rate.prefix());
                json.writeNumberField("duration_s", durationS);
                json.writeNumberField("billed_s", billedS);
                json.writeNumberField("amount_nanos", nanos);
                json.writeNumberField("balance_nanos", balance);
                json.writeEndObject();
            }
            return buffer.toByteArray();
        }

        private byte[] request(String tenant, long balance) throws IOException {
            buffer.reset();
            try (JsonGenerator json = JSON.createGenerator(buffer)) {
                json.writeStartObject();
                json.writeStringField("tenant_id", tenant);
                json.writeStringField("caused_by", eventId);
                json.writeNumberField("balance_nanos", balance);
                json.writeEndObject();
            }
            return buffer.toByteArray();
        }
    }

    /** A row of the deck: nanos a minute and a call, seconds; to what nanos it rounds, and how. */
    private record Rate(
            String prefix,
            long perMinute,
            long connectFee,
            int initialIncrementS,
            int incrementS,
            long unit,
            String mode) {
        /** Whole started increments: the first one, then the following ones. */
        int billedSeconds(int durationS) {
            if (durationS <= 0) {
                return 0;
            }
            if (durationS <= initialIncrementS) {
                return initialIncrementS;
            }
            int more = durationS - initialIncrementS;
            return initialIncrementS + (more + incrementS - 1) / incrementS * incrementS;
        }

        long price(int billedS) {
            if (billedS == 0) {
                return 0;
            }
            long below = 60 * unit;
            long above = connectFee * 60 + billedS * perMinute;
            return unit * switch (mode) {
                case "up" -> (above + below - 1) / below;
                case "down" -> above / below;
                default -> (above + below / 2) / below;
            };
        }
    }

    /** Longest prefix, as a tree of digits. */
    private static final class Deck {
        private static final int RADIX = 10;

        private final List<int[]> following = new ArrayList<>();
        private final List<Rate> rates = new ArrayList<>();

        static Deck read(Path path) throws IOException {
            Deck deck = new Deck();
            deck.node();
            for (String line : Files.readAllLines(path)) {
                String[] columns = line.split(",");
                deck.add(
                        new Rate(
                                columns[0],
                                Long.parseLong(columns[1]),
                                Long.parseLong(columns[2]),
                                Integer.parseInt(columns[3]),
                                Integer.parseInt(columns[4]),
                                Long.parseLong(columns[5]),
                                columns[6]));
            }
            return deck;
        }

        private int node() {
            following.add(new int[RADIX]);
            rates.add(null);
            return rates.size() - 1;
        }

        private void add(Rate rate) {
            int node = 0;
            for (char digit : rate.prefix().toCharArray()) {
                int next = following.get(node)[digit - '0'];
                if (next == 0) {
                    next = node();
                    following.get(node)[digit - '0'] = next;
                }
                node = next;
            }
            rates.set(node, rate);
        }

        /** The row of the longest prefix of "+digits"; null when there is none. */
        Rate find(String number) {
            Rate found = null;
            int node = 0;
            for (int at = 1; at < number.length(); at++) {
                node = following.get(node)[number.charAt(at) - '0'];
                if (node == 0) {
                    return found;
                }
                if (rates.get(node) != null) {
                    found = rates.get(node);
                }
            }
            return found;
        }
    }
}
