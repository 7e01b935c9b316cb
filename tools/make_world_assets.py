"""Make the drawing assets of winnow's reference world: the glyph sheet and the letter sheet.

    apt-get install fonts-noto-color-emoji fonts-dejavu-core fonts-dejavu-extra
    python tools/make_world_assets.py

Writes into winnow/world/assets/: glyphs.png (the sheet to look at), glyphs.npz (the same sprites, indexed colour, what
the package loads), glyphs.json (names, code points, groups, in sheet order), letters.npz and the fonts' licence texts.
"""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ASSETS = Path(__file__).resolve().parents[1] / "winnow" / "world" / "assets"
EMOJI_FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
EMOJI_PIXELS = 109  # the only size of this bitmap font
DEJAVU = "/usr/share/fonts/truetype/dejavu/DejaVu"
FACES = ("Sans-Bold", "Serif-Bold", "SansMono-Bold", "SansCondensed-Bold", "Sans")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
CELL = 72  # pixels of a glyph's longer side
LETTER_PIXELS = 40  # font size of the letter masks; the package shrinks them
LETTER_CELL = 40, 52  # height, width of one mask; the pen starts at x = 4

NAMED = """
dog🐶 cat🐱 mouse🐭 rabbit🐰 fox🦊 bear🐻 panda🐼 koala🐨 tiger🐯 lion🦁 cow🐮 pig🐷 frog🐸 monkey🐵 chicken🐔
penguin🐧 bird🐦 chick🐤 duck🦆 eagle🦅 owl🦉 bat🦇 wolf🐺 boar🐗 horse🐴 unicorn🦄 bee🐝 caterpillar🐛 butterfly🦋
snail🐌 ladybug🐞 ant🐜 spider🕷 scorpion🦂 turtle🐢 snake🐍 lizard🦎 squid🦑 octopus🐙 shrimp🦐 crab🦀 blowfish🐡
fish🐟 dolphin🐬 whale🐳 shark🦈 crocodile🐊 zebra🦓 gorilla🦍 elephant🐘 rhino🦏 camel🐪 giraffe🦒 sheep🐑 goat🐐
deer🦌 rooster🐓 turkey🦃 swan🦢 parrot🦜 flamingo🦩 hedgehog🦔 dragon🐉 peacock🦚 lobster🦞 otter🦦 sloth🦥
skunk🦨 kangaroo🦘 badger🦡 cactus🌵 tree🌳 palm🌴 pine🌲 clover🍀 maple🍁 mushroom🍄 rose🌹 tulip🌷 sunflower🌻
blossom🌸 hibiscus🌺 sun🌞 moon🌙 cloud☁ fire🔥 snowman⛄ rainbow🌈 volcano🌋 apple🍎 pear🍐 tangerine🍊 lemon🍋
banana🍌 watermelon🍉 grapes🍇 strawberry🍓 cherries🍒 peach🍑 pineapple🍍 coconut🥥 kiwi🥝 tomato🍅 eggplant🍆
avocado🥑 broccoli🥦 carrot🥕 corn🌽 pepper🌶 potato🥔 cucumber🥒 garlic🧄 onion🧅 mango🥭 bread🍞 cheese🧀 egg🥚
bacon🥓 burger🍔 fries🍟 pizza🍕 hotdog🌭 sandwich🥪 taco🌮 sushi🍣 icecream🍦 donut🍩 cookie🍪 cake🎂 chocolate🍫
candy🍬 honey🍯 milk🥛 coffee☕ wine🍷 beer🍺 popcorn🍿 pretzel🥨 croissant🥐 waffle🧇 salad🥗 soccer⚽
basketball🏀 football🏈 tennis🎾 trophy🏆 guitar🎸 trumpet🎺 violin🎻 drum🥁 piano🎹 dart🎯 kite🪁 car🚗 taxi🚕
bus🚌 ambulance🚑 truck🚚 tractor🚜 bicycle🚲 motorcycle🏍 train🚂 airplane✈ rocket🚀 helicopter🚁 sailboat⛵ ship🚢
anchor⚓ canoe🛶 scooter🛴 house🏠 castle🏰 tent⛺ church⛪ phone📱 camera📷 television📺 radio📻 clock⏰ bulb💡
candle🕯 book📖 key🔑 hammer🔨 scissors✂ umbrella☂ hat🎩 crown👑 glasses👓 shoe👞 boot👢 shirt👕 dress👗 jeans👖
backpack🎒 gift🎁 balloon🎈 bell🔔 heart❤ ghost👻 robot🤖 alien👽 skull💀 clown🤡 baby👶 pencil✏ magnet🧲 broom🧹
basket🧺 teddy🧸 lock🔒 envelope✉ laptop💻 compass🧭
"""
CLUTTER = """
recycle♻ radioactive☢ atom⚛ yinyang☯ warning⚠ noentry⛔ cyclone🌀 sparkles✨ collision💥 comet☄ gem💎 bomb💣 pill💊
puzzle🧩 dice🎲 slot🎰 ferris🎡 circus🎪 palette🎨 globe🌍 bandage🩹 microbe🦠 thread🧵 masks🎭
"""


def sprite(character: str) -> Image.Image:
    """The character in colour, cropped to its ink, its longer side CELL pixels."""
    font = ImageFont.truetype(EMOJI_FONT, EMOJI_PIXELS)
    image = Image.new("RGBA", (180, 180), (0, 0, 0, 0))
    ImageDraw.Draw(image).text((10, 10), character, font=font, embedded_color=True)
    box = image.getbbox()
    if box is None:
        raise SystemExit(f"{EMOJI_FONT} has no picture for {character!r}")
    image = image.crop(box)
    scale = CELL / max(image.size)
    return image.resize((max(4, round(image.width * scale)), max(4, round(image.height * scale))), Image.LANCZOS)


def make_glyphs() -> None:
    entries = []
    for group, text in (("named", NAMED), ("clutter", CLUTTER)):
        for item in text.split():
            name = item.rstrip("".join(c for c in item if not c.isascii()))
            entries.append((name, item[len(name) :], group))
    names = [name for name, _, _ in entries]
    doubles = {name for name in names if names.count(name) > 1}
    if doubles:
        raise SystemExit(f"glyph names used twice: {sorted(doubles)}")
    columns = 16
    sheet = Image.new("RGBA", (columns * CELL, -(-len(entries) // columns) * CELL), (0, 0, 0, 0))
    pixels = np.zeros((len(entries), CELL, CELL), np.uint8)
    palettes = np.zeros((len(entries), 96, 4), np.uint8)
    sizes = np.zeros((len(entries), 2), np.uint8)
    rows = []
    for index, (name, character, group) in enumerate(entries):
        image = sprite(character)
        indexed = image.quantize(96, method=Image.Quantize.FASTOCTREE)
        palette = np.array(indexed.getpalette("RGBA"), np.uint8).reshape(-1, 4)
        pixels[index, : image.height, : image.width] = np.asarray(indexed)
        palettes[index, : len(palette)] = palette
        sizes[index] = image.height, image.width
        sheet.paste(indexed.convert("RGBA"), (index % columns * CELL, index // columns * CELL))
        rows.append(
            {
                "name": name,
                "codepoint": f"U+{ord(character[0]):04X}",
                "unicode_name": unicodedata.name(character[0], "").lower(),
                "group": group,
            }
        )
    sheet.quantize(256, method=Image.Quantize.FASTOCTREE).save(ASSETS / "glyphs.png", optimize=True)
    np.savez_compressed(ASSETS / "glyphs.npz", pixels=pixels, palettes=palettes, sizes=sizes)
    (ASSETS / "glyphs.json").write_text(json.dumps(rows, ensure_ascii=True, indent=0) + "\n")
    print(f"{len(rows)} glyphs, {sum(r['group'] == 'named' for r in rows)} named")


def make_letters() -> None:
    """One mask per face and letter on a common baseline, with the advance width."""
    height, width = LETTER_CELL
    masks = np.zeros((len(FACES), len(LETTERS), height, width), np.uint8)
    advances = np.zeros((len(FACES), len(LETTERS)), np.float32)
    for f, face in enumerate(FACES):
        font = ImageFont.truetype(f"{DEJAVU}{face}.ttf", LETTER_PIXELS)
        for i, letter in enumerate(LETTERS):
            image = Image.new("L", (width, height), 0)
            ImageDraw.Draw(image).text((4, 32), letter, font=font, fill=255, anchor="ls")
            masks[f, i] = np.asarray(image)
            advances[f, i] = font.getlength(letter)
    np.savez_compressed(ASSETS / "letters.npz", masks=masks, advances=advances, letters=np.array(LETTERS))
    print(f"{len(FACES)} faces of {len(LETTERS)} letters")


def copy_licences() -> None:
    for package in ("fonts-noto-color-emoji", "fonts-dejavu-core"):
        text = Path(f"/usr/share/doc/{package}/copyright").read_text()
        (ASSETS / f"LICENSE-{package}.txt").write_text(text)


if __name__ == "__main__":
    ASSETS.mkdir(parents=True, exist_ok=True)
    make_glyphs()
    make_letters()
    copy_licences()
