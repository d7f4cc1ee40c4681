"""The auditor behind `credits verify`: an independent, slow, obvious reader of all topics.

It shares no code with core or engine: it decodes, prices, hashes and folds by itself, with plain
dicts, integers and fractions. It reads the position rows first, waits until every transaction that
was open then has ended, reads everything else, judges what lies below the positions and calls the
rest pending. What could not be read is never a pass.

`reading` reads the topics of an installation, `audit` takes what was read through every subject in
turn, `verdict` says what was found. Each other module is one subject: it holds what the topics say
of it, judges that, and remembers what an audit that goes on from a checkpoint has to know.
"""
