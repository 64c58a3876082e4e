import asyncio, subprocess, sys, textwrap, time
from tests.builders import *
from app.documents.galleries import Gallery
async def test_k(runtime, mongo_server, database_name):
    await active(runtime, "ann")
    code = textwrap.dedent(f'''
        import pymongo, time
        c = pymongo.MongoClient({mongo_server.url!r})
        s = c.start_session(); s.start_transaction()
        c[{database_name!r}].galleries.update_one({{}}, {{"$inc": {{"seq": 1}}}}, session=s)
        print("ready", flush=True); time.sleep(100)
    ''')
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    p.stdout.readline(); p.kill(); p.wait(); p.stdout.close()
    t = time.monotonic(); n = 0
    while True:
        try:
            await enrolled(runtime, f"p{n}"); break
        except Exception as e:
            n += 1; last = repr(e)[:200]
    print("took", time.monotonic() - t, n, last if n else None)
    assert 0
